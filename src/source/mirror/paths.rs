//! Converts names of another host into paths below a local directory.

use std::borrow::Cow;
use std::path::{Component, Path, PathBuf};

use crate::source::extension;

/// Whether the file may contain the data of a disk of this kind. That is a delta beside a VMDK, or
/// an overlay of any name beside another image.
pub(super) fn may_be_link(path: &Path, name: &str) -> bool {
    let (own, other) = (extension(path), extension(Path::new(name)));
    let vmware = |kind: &str| matches!(kind, "vmdk" | "vmx" | "vmtx");
    const NOT_DISKS: [&str; 12] = [
        "log", "nvram", "iso", "vmsd", "vmxf", "vmsn", "vmem", "vswp", "mf", "xml", "ovf", "txt",
    ];
    let data = ["-flat.vmdk", "-ctk.vmdk", "-delta.vmdk", "-sesparse.vmdk"];
    let data = data.iter().any(|end| name.ends_with(end));
    match vmware(&own) {
        true => other == "vmdk" && !data,
        false => !NOT_DISKS.contains(&&*other) && !vmware(&other),
    }
}

/// Converts a name: `[datastore] folder/name` is a path of ESXi, and a backslash is a separator on
/// Windows.
pub(super) fn remote_path(name: &str) -> Cow<'_, str> {
    let datastore = name
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("] "));
    if let Some((datastore, path)) = datastore {
        return format!("/vmfs/volumes/{datastore}/{path}").into();
    }
    match name.contains('\\') {
        true => {
            let name = name.replace('\\', "/");
            let drive = name.as_bytes().get(1) == Some(&b':');
            match drive {
                true => name
                    .rsplit('/')
                    .next()
                    .unwrap_or_default()
                    .to_owned()
                    .into(),
                false => name.into(),
            }
        }
        false => name.into(),
    }
}

/// Appends `name`, which may contain directories, to `folder`; `None` if it leads out.
pub(super) fn below(folder: &Path, name: &Path) -> Option<PathBuf> {
    let mut path = folder.to_owned();
    for part in name.components() {
        match part {
            Component::Normal(part) if !part.as_encoded_bytes().contains(&0) => path.push(part),
            Component::CurDir | Component::RootDir => {}
            _ => return None,
        }
    }
    (path != folder).then_some(path)
}

/// Appends a name without directories.
pub(super) fn one_name(folder: &Path, name: &str) -> Option<PathBuf> {
    let plain = !name.is_empty() && !name.contains(['/', '\0']) && name != "." && name != "..";
    plain.then(|| folder.join(name))
}

/// Removes `..`; `None` if the path leads above its start.
pub(super) fn normal(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir if !plain.pop() => return None,
            Component::ParentDir | Component::CurDir => {}
            Component::Normal(part) => plain.push(part),
            _ => return None,
        }
    }
    Some(plain)
}
