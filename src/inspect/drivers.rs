//! VirtIO driver services the guest already has.

use crate::boot_path::{BootContext, ImageState};
use crate::registry::error::Result;

use super::model::VirtioService;

/// The services of the virtio-win drivers, as their INFs name them.
const VIRTIO_SERVICES: [&str; 21] = [
    "viostor",
    "vioscsi",
    "netkvm",
    "balloon",
    "vioserial",
    "virtioserial",
    "vioser",
    "viorng",
    "virtrng",
    "vioinput",
    "virtioinput",
    "viohidkmdf",
    "viofs",
    "virtiofsdrv",
    "viogpudo",
    "viogpudod",
    "viomem",
    "viosock",
    "virtiosocket",
    "fwcfg",
    "pvpanic",
];

pub fn virtio(ctx: &BootContext<'_>) -> Result<Vec<VirtioService>> {
    let mut found = Vec::new();
    for name in VIRTIO_SERVICES {
        let Some(service) = ctx.service(name)? else {
            continue;
        };
        let image_present = service
            .image
            .as_ref()
            .is_ok_and(|path| (ctx.image)(path).state != ImageState::Missing);
        found.push(VirtioService {
            service: name.to_string(),
            start: service.start,
            start_override: service.start_override(),
            image_present,
        });
    }
    Ok(found)
}
