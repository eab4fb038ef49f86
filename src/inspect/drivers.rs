//! VirtIO driver services that the guest already has.

use crate::boot_path::{BootContext, ImageState};
use crate::drivers::Catalogue;
use crate::registry::error::Result;

use super::model::VirtioService;

pub fn virtio(ctx: &BootContext<'_>) -> Result<Vec<VirtioService>> {
    let mut found = Vec::new();
    let catalogue = Catalogue::builtin();
    for name in catalogue.drivers.iter().flat_map(|d| &d.services) {
        let Some(service) = ctx.service(name)? else {
            continue;
        };
        let image_present = service
            .image
            .as_ref()
            .is_ok_and(|path| (ctx.image)(path).state != ImageState::Missing);
        found.push(VirtioService {
            service: name.clone(),
            start: service.start,
            start_override: service.start_override(),
            image_present,
        });
    }
    Ok(found)
}
