//! Opens an image and everything below it, with checks of formats, lengths, tables and references.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::between;
use super::chain::Image;
use super::charset::{Charset, Name};
use super::detect::{self, Detected, Format, VmdkExtent};
use super::error::{ImageError, MAX_LEVELS, Result};
use super::hold::Held;
use super::length::{self, Short};
use super::level::Level;
use super::links;
use super::on_wire::{is_flat, joined, with_head, without_backing};
use super::partition::{self, LayoutError};
use super::references::{References, shown};
use super::remote::{self, ReadAt};
use super::tables;
use super::vhd;
use super::vmdk;
use crate::block::FileDisk;
use crate::tool::pass;
use crate::tool::qemu_img;

/// The largest virtual size: Hyper-V's limit; VMware's is 62 TiB. Tables of a larger disk take
/// minutes to read, and no guest has one.
const MAX_VIRTUAL_SIZE: u64 = 64 << 40;

impl Image {
    /// Opens the image and every file it refers to. `format` is the one given by the user; without
    /// it, it is detected. `allow` lists files and directories to which it may refer, besides the
    /// image's own directory.
    pub fn open_info(path: &Path, format: Option<&str>, allow: &[PathBuf]) -> Result<Self> {
        let format = format
            .map(|name| {
                Format::by_name(name).ok_or_else(|| ImageError::UnknownFormat {
                    name: name.to_owned(),
                })
            })
            .transpose()?;
        let path = std::path::absolute(path).map_err(|e| ImageError::from_io(path, e))?;
        let named = Held::open(&path)?;
        let references = References::new(&named, allow);
        let image = Self::open_levels(named, format, &references)?;
        image.held().try_for_each(Held::refuse_if_vmware_has_it)?;
        Ok(image)
    }

    fn open_levels(named: Held, format: Option<Format>, references: &References) -> Result<Self> {
        let path = named.path().to_owned();
        let mut seen = Vec::new();
        let mut levels = Vec::new();
        let mut next = Some((named, format));
        while let Some((file, format)) = next {
            if levels.len() == MAX_LEVELS || seen.contains(&file.id()) {
                return Err(ImageError::TooDeep { path });
            }
            seen.push(file.id());
            let (level, backing) = open_level(file, format, references)?;
            levels.push(level);
            next = backing;
        }
        Self { levels }.with_links_merged()
    }

    /// Opens the backing image while a VM may be writing to the image itself. VMware's locks on the
    /// files below it do not matter. `None` if there is no backing image.
    pub(crate) fn open_frozen(
        path: &Path,
        format: Option<&str>,
        allow: &[PathBuf],
    ) -> Result<Option<Self>> {
        let path = std::path::absolute(path).map_err(|e| ImageError::from_io(path, e))?;
        let named = Held::open_in_use(&path)?;
        let references = References::new(&named, allow);
        let format = match format.and_then(Format::by_name) {
            Some(format) => format,
            None => detected(&named)?,
        };
        let (told, below) = match format {
            // QEMU could provide no more about a running delta than its descriptor does.
            Format::VMDK => (String::new(), None),
            Format::QCOW2 => match ask_qemu(&mut Level::of(&named, format), &named)? {
                Some((name, format)) if !name.is_empty() => (name, format),
                _ => return Ok(None),
            },
            _ => return Ok(None),
        };
        let below =
            below.map(|name| Format::by_name(&name).ok_or(ImageError::UnknownFormat { name }));
        let name = match format {
            Format::VMDK => vmdk::parent(&path, named.contents(), named.size()),
            _ => backing_name(&told, &named, format).map(Some),
        };
        let Some(name) = name.map_err(|e| ImageError::from_io(&path, e))? else {
            return Ok(None);
        };
        let file = references.open(&path, &name)?;
        Self::open_levels(file, below.transpose()?, &references).map(Some)
    }
}

/// Sets the size that QEMU should use for the disk of a VHD.
fn show_vhd(level: &mut Level, file: &Held) -> io::Result<()> {
    match vhd::shown(file.contents(), file.size())? {
        Some(vhd::Shown::Raw(size)) => level.fixed = Some(size),
        Some(vhd::Shown::Head(bytes)) if file.remote().is_some() => {
            level.shown = file.remote().map(|remote| with_head(remote, bytes));
        }
        Some(vhd::Shown::Head(bytes)) => {
            let head = in_memory(&bytes)?;
            let text = vhd::descriptor(&pass::name(&head), &file.name(), file.size());
            level.descriptor = Some(Arc::new(in_memory(text.as_bytes())?));
            level.head = Some(Arc::new(head));
        }
        None => {}
    }
    Ok(())
}

type Backing = Option<(Held, Option<Format>)>;

fn open_level(
    file: Held,
    format: Option<Format>,
    references: &References,
) -> Result<(Level, Backing)> {
    let path = &file.path().to_owned();
    let io_error = |e| ImageError::from_io(path, e);
    let size = file.size();
    if size == 0 {
        return Err(ImageError::Empty { path: path.into() });
    }
    let format = match format {
        Some(format) => format,
        None => detected(&file)?,
    };
    let mut level = Level::of(&file, format);
    if format == Format::RAW {
        // QEMU could add nothing, and it counts in sectors.
        level.virtual_size = size.checked_next_multiple_of(512).unwrap_or(u64::MAX);
        refuse_if_huge(&level)?;
        if let Some(short) = short_by_table(&file).map_err(io_error)? {
            return Err(short_at(path, short, true));
        }
        return Ok((level, None));
    }
    if format == Format::VMDK {
        open_extents(&mut level, &file, references)?;
    }
    if level.flat.is_some() {
        return flat_level(level, &file, references);
    }
    check_file(&level, &file)?;
    if format == Format::VPC {
        show_vhd(&mut level, &file).map_err(io_error)?;
    }
    if format == Format::QCOW2 {
        open_data_file(&mut level, &file, references)?;
    }
    let backing = ask_qemu(&mut level, &file)?;
    if backing.is_some() {
        level.shown = without_backing(&file, format).map_err(io_error)?;
    }
    let backing = match backing {
        Some((name, format_named)) if !name.is_empty() => {
            let name = backing_name(&name, &file, format).map_err(io_error)?;
            let file = references.open(path, &name)?;
            if remote::backing(&name.text).is_some() {
                let empty = between::empty(level.virtual_size).map_err(io_error)?;
                level.between = Some(Arc::new(empty));
            }
            let format = format_named
                .map(|name| Format::by_name(&name).ok_or(ImageError::UnknownFormat { name }))
                .transpose()?;
            Some((file, format))
        }
        _ => None,
    };
    Ok((level, backing))
}

/// Checks the file itself: whether it is complete, and has its data in itself or in files that QEMU
/// can combine.
fn check_file(level: &Level, file: &Held) -> Result<()> {
    let (path, size, format) = (file.path(), file.size(), level.format);
    let io_error = |e| ImageError::from_io(path, e);
    if let Some(short) = length::image(file.contents(), size, format).map_err(io_error)? {
        return Err(short_at(path, short, false));
    }
    if format == Format::VPC && detect::no_vhd(file.contents(), size).map_err(io_error)? {
        return Err(cut_vhd(file)?);
    }
    if detect::lost_footer(file.contents(), size, format).map_err(io_error)? {
        return Err(ImageError::Damaged {
            path: path.into(),
            reason: "the footer at its end is missing".into(),
        });
    }
    refuse_differencing(file.contents(), size, path, format)?;
    if format == Format::QCOW2
        && let Some(fault) = tables::qcow2(file.contents(), size).map_err(io_error)?
    {
        let (path, reason) = (path.to_owned(), fault.to_string());
        return Err(match fault {
            tables::TableFault::Shared { .. } => ImageError::Damaged { path, reason },
            _ => ImageError::Unsupported {
                path,
                reason,
                remedy: "copy the disk without them: qemu-img convert -O qcow2 IMAGE COPY",
            },
        });
    }
    Ok(())
}

/// Opens the external data file of a qcow2.
fn open_data_file(level: &mut Level, file: &Held, references: &References) -> Result<()> {
    let path = file.path();
    let io_error = |e| ImageError::from_io(path, e);
    let name = detect::qcow2_data_file(file.contents(), file.size()).map_err(io_error)?;
    let Some(name) = name else {
        return Ok(());
    };
    let data = references.open(path, &Name::new(Charset::default(), &name))?;
    let short = length::data_file(file.contents(), file.size(), data.size()).map_err(io_error)?;
    if let Some(short) = short {
        return Err(short_at(data.path(), short, false));
    }
    level.data_file = Some(data.path().to_owned());
    level.held.push(data);
    Ok(())
}

/// Reads the output of `qemu-img info`. Returns the name of the backing file, and its format if the
/// image names it.
fn ask_qemu(level: &mut Level, file: &Held) -> Result<Option<(String, Option<String>)>> {
    let path = file.path();
    let info = qemu_img::info(&level.spec()).map_err(|e| ImageError::from_tool(path, e))?;
    if info.encrypted {
        return Err(ImageError::Unsupported {
            path: path.into(),
            reason: "the image is encrypted".into(),
            remedy: "make a decrypted copy of the image first",
        });
    }
    level.virtual_size = info.virtual_size;
    refuse_if_huge(level)?;
    level.allocated = info.actual_size.unwrap_or(level.allocated);
    let data = info.format_specific.map(|f| f.data).unwrap_or_default();
    level.subformat = data.create_type;
    if data.corrupt == Some(true) {
        return Err(ImageError::Damaged {
            path: path.into(),
            reason: "QEMU has marked it as corrupt".into(),
        });
    }
    if data.data_file.is_some() && level.data_file.is_none() {
        return Err(ImageError::Damaged {
            path: path.into(),
            reason: "QEMU finds a data file where its header names none".into(),
        });
    }
    let format = info.backing_filename_format;
    Ok(info.backing_filename.map(|name| (name, format)))
}

/// Describes a flat VMDK from its descriptor, without QEMU.
fn flat_level(mut level: Level, file: &Held, references: &References) -> Result<(Level, Backing)> {
    let path = file.path();
    level.virtual_size = level.flat.as_ref().map_or(0, |flat| flat.file().size());
    level.subformat = Some("flat".into());
    level.allocated = level.virtual_size;
    refuse_if_huge(&level)?;
    let parent = vmdk::parent(path, file.contents(), file.size());
    if let Some(parent) = parent.map_err(|e| ImageError::from_io(path, e))? {
        // Flat nevertheless: no data of the parent is visible.
        references.open(path, &parent)?;
    }
    Ok((level, None))
}

/// The name of the backing file from QEMU. It is read from the image itself if its bytes are text
/// in another encoding, or no UTF-8, which QEMU cannot print.
fn backing_name(told: &str, image: &Held, format: Format) -> io::Result<Name> {
    let (file, size) = (image.contents(), image.size());
    let own = match format {
        Format::VMDK => vmdk::parent(image.path(), file, size)?,
        _ => {
            let bytes = detect::backing_name(file, size)?;
            let bytes = bytes.filter(|bytes| std::str::from_utf8(bytes).is_err());
            bytes.map(|bytes| Name::new(Charset::default(), &bytes))
        }
    };
    Ok(own.unwrap_or_else(|| Name::new(Charset::default(), told.as_bytes())))
}

/// Refuses a huge disk before it is read as a whole.
fn refuse_if_huge(level: &Level) -> Result<()> {
    if level.virtual_size <= MAX_VIRTUAL_SIZE {
        return Ok(());
    }
    Err(ImageError::Unsupported {
        path: level.path.clone(),
        reason: format!(
            "its disk has {} TiB, and at most {} TiB are converted",
            level.virtual_size >> 40,
            MAX_VIRTUAL_SIZE >> 40
        ),
        remedy: "shrink the disk on the old host: no VMware or Hyper-V disk is larger than 64 TiB",
    })
}

/// Whether a raw disk of that name is more likely a damaged image, or no image at all.
fn claims_a_format(path: &Path) -> bool {
    let stem = path
        .file_stem()
        .and_then(|s| s.to_str())
        .unwrap_or_default();
    match path
        .extension()
        .and_then(|s| s.to_str())
        .map(str::to_ascii_lowercase)
    {
        // The extents of a flat vmdk are raw: `vm-flat.vmdk`, `vm-f001.vmdk`.
        Some(ext) if ext == "vmdk" => !stem
            .rsplit_once('-')
            .is_some_and(|(_, part)| part == "flat" || part.starts_with('f')),
        Some(ext) => matches!(&*ext, "qcow2" | "vhd" | "vhdx" | "vdi"),
        None => false,
    }
}

/// The detected format of a file without a given one.
fn detected(file: &Held) -> Result<Format> {
    let path = file.path();
    let detected = detect::detect(file.contents(), file.size());
    match detected.map_err(|e| ImageError::from_io(path, e))? {
        Detected::Image(Format::RAW) if !file.is_block_device() && named_vhd(path) => {
            Err(cut_vhd(file)?)
        }
        Detected::Image(Format::RAW) if !file.is_block_device() && claims_a_format(path) => {
            Err(ImageError::Damaged {
                path: path.into(),
                reason: "its contents do not have the format of its name".into(),
            })
        }
        Detected::Image(format) => Ok(format),
        Detected::Packed(what) => Err(ImageError::Packed {
            path: path.into(),
            what,
        }),
    }
}

/// Opens the further files of a vmdk, and writes the descriptor for QEMU.
fn open_extents(level: &mut Level, file: &Held, references: &References) -> Result<()> {
    let path = file.path();
    let io_error = |e| ImageError::from_io(path, e);
    let Some(text) = detect::vmdk_descriptor(file.contents(), file.size()).map_err(io_error)?
    else {
        if detect::is_sparse_vmdk(file.contents(), file.size()).map_err(io_error)? {
            return Ok(());
        }
        // QEMU would use any text as a descriptor, and open the files it names.
        return Err(ImageError::Damaged {
            path: path.into(),
            reason: "it begins neither like a VMDK nor like the descriptor of one".into(),
        });
    };
    let charset = vmdk::charset(&text);
    for extent in detect::parse_extents(&text) {
        let name = Name::new(charset, &extent.name);
        let mut part = references.open(path, &name)?;
        if let Some(remote) = part.remote()
            && !is_flat(&extent)
        {
            // QEMU opens the sparse extents of a descriptor only as files.
            remote::fetch(part.path(), remote).map_err(|e| ImageError::from_io(part.path(), e))?;
            part = references.open(path, &name)?;
        }
        refuse_nested(&part, &extent)?;
        let short = length::extent(part.contents(), part.size(), &extent);
        if let Some(short) = short.map_err(io_error)? {
            return Err(short_at(part.path(), short, false));
        }
        level.extents.push(part.path().to_owned());
        level.held.push(part);
    }
    if level
        .held
        .iter()
        .skip(1)
        .any(|part| part.remote().is_some())
    {
        level.flat = Some(joined(path, &text, &level.held[1..])?);
        return Ok(());
    }
    let names = level.held.iter().skip(1).map(Held::name);
    let text = detect::with_extents(&text, names).map_err(|line| ImageError::Damaged {
        path: path.into(),
        reason: format!("its descriptor has an extent nobody understands: {line}"),
    })?;
    level.descriptor = Some(Arc::new(in_memory(&text).map_err(io_error)?));
    Ok(())
}

fn short_at(path: &Path, short: Short, table: bool) -> ImageError {
    ImageError::Short {
        path: path.into(),
        short,
        table,
    }
}

/// Finds data behind the end of a raw disk. The file may be shorter than its size in QEMU, which is
/// rounded up to full sectors.
fn short_by_table(file: &Held) -> io::Result<Option<Short>> {
    let layout = match file.remote() {
        Some(remote) => partition::read_layout(&**remote),
        None => partition::read_layout(&FileDisk::from_file(file.file().try_clone()?)?),
    };
    Ok(match layout {
        Err(LayoutError::Short(short)) => Some(short),
        // Any later reader of the table gets the same error.
        _ => None,
    })
}

fn named_vhd(path: &Path) -> bool {
    let extension = path.extension();
    extension.is_some_and(|e| e.eq_ignore_ascii_case("vhd"))
}

/// The error for a truncated VHD. Without footers it is a fixed one, which begins like a raw disk.
fn cut_vhd(file: &Held) -> Result<ImageError> {
    const FOOTER: u64 = 512;
    let (path, size) = (file.path(), file.size());
    let by_table = short_by_table(file).map_err(|e| ImageError::from_io(path, e))?;
    let short = by_table.unwrap_or_else(|| Short {
        what: "the footer of a fixed VHD".into(),
        // In the last partial sector, or behind the last one.
        needs: match size % FOOTER {
            0 => size.saturating_add(FOOTER),
            _ => size.next_multiple_of(FOOTER),
        },
        has: size,
    });
    Ok(short_at(path, short, false))
}

/// Refuses a descriptor in an extent: QEMU would open the files that it names.
fn refuse_nested(part: &Held, extent: &VmdkExtent) -> Result<()> {
    let nested = detect::vmdk_descriptor(part.contents(), part.size())
        .map_err(|e| ImageError::from_io(part.path(), e))?;
    // Whatever it lists: QEMU may find more in it.
    if nested.is_some() && !extent.kind.eq_ignore_ascii_case("FLAT") {
        return Err(ImageError::Damaged {
            path: part.path().into(),
            reason: "an extent that has extents itself".into(),
        });
    }
    Ok(())
}

/// A file without a name.
fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create("vmdk", flags)?);
    io::Write::write_all(&mut file, bytes)?;
    Ok(file)
}

/// Refuses differencing images that QEMU cannot combine with their parents. It even reads a
/// differencing VHD as if it had no parent: with zeroes in place of the parent's data.
fn refuse_differencing(file: &dyn ReadAt, size: u64, path: &Path, format: Format) -> Result<()> {
    let io_error = |e| ImageError::from_io(path, e);
    let refused = |kind: &str, parent: Option<String>, remedy: &'static str| {
        let parent = parent.map_or(String::new(), |p| format!(" {}", shown(&p)));
        Err(ImageError::Unsupported {
            path: path.into(),
            reason: format!(
                "it is a differencing {kind}, which QEMU cannot combine with its parent{parent}"
            ),
            remedy,
        })
    };
    match format {
        Format::VPC => {
            for offset in [0, size.saturating_sub(512)] {
                let footer = detect::read_up_to(file, offset, 512, size).map_err(io_error)?;
                if detect::vhd_type(&footer) == Some(detect::VHD_DIFFERENCING) {
                    return refused(
                        "VHD",
                        None,
                        "merge it with its parent first (Hyper-V: Merge-VHD)",
                    );
                }
            }
        }
        Format::VHDX => {
            let parent = links::vhdx_parent(file, size).map_err(io_error)?;
            if !parent.is_empty() {
                let name = |key: &str| {
                    parent
                        .iter()
                        .find(|(k, _)| k == key)
                        .map(|(_, v)| v.clone())
                };
                return refused(
                    "VHDX (a checkpoint's .avhdx)",
                    name("absolute_win32_path").or(name("relative_path")),
                    "delete the checkpoints in Hyper-V and wait for the merge, or make one disk of the chain with Convert-VHD",
                );
            }
        }
        Format::VDI => {
            // uuidLinkage of the header: the parent's id.
            let link = detect::read_up_to(file, 424, 16, size).map_err(io_error)?;
            if link.iter().any(|b| *b != 0) {
                return refused(
                    "VDI (a snapshot of VirtualBox)",
                    None,
                    "make one disk of the chain with VBoxManage clonemedium",
                );
            }
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_claim_a_format() {
        for (name, want) in [
            ("a.vmdk", true),
            ("a-flat.vmdk", false),
            ("a-f001.vmdk", false),
            ("a.b-c.VMDK", true),
            ("a.vhdx", true),
            ("a.img", false),
            ("disk", false),
        ] {
            assert_eq!(claims_a_format(Path::new(name)), want, "{name}");
        }
    }
}
