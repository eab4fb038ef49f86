//! All findings of the inspection with their texts, in one table.
//!
//! `docs/guests.md` is generated from it. A part in `<` and `>` is a placeholder, whose name is for
//! the reader. An identifier with several texts has several rows.

use std::fmt::Display;

use super::model::{Finding, Severity};

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Text {
    /// `findings[].id` of `inspect`, listed in [`crate::ids`].
    pub id: &'static str,
    pub severity: Severity,
    /// Names the consequence.
    pub message: &'static str,
    pub remedy: &'static str,
}

impl Text {
    /// Creates the finding. `evidence` is the key, file or partition it was read from.
    pub(crate) fn found(self, evidence: impl Into<String>) -> Finding {
        self.found_with(&[], evidence)
    }

    /// Creates the finding; `parts` fill the placeholders of the message and then those of the
    /// remedy.
    pub(crate) fn found_with(self, parts: &[&dyn Display], evidence: impl Into<String>) -> Finding {
        let mut parts = parts.iter();
        let message = fill(self.message, &mut parts);
        let remedy = fill(self.remedy, &mut parts);
        debug_assert_eq!(parts.len(), 0, "{}: parts without a place", self.id);
        Finding {
            id: self.id,
            severity: self.severity,
            message,
            remedy,
            evidence: evidence.into(),
        }
    }
}

/// Replaces each `<name>` in `text` by the next of `parts`.
fn fill(text: &str, parts: &mut std::slice::Iter<'_, &dyn Display>) -> String {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, name)) = rest.split_once('<')
        && let Some((name, after)) = name.split_once('>')
    {
        filled += before;
        match parts.next() {
            Some(part) => filled += &part.to_string(),
            None => debug_assert!(false, "nothing for <{name}> in {text:?}"),
        }
        rest = after;
    }
    filled + rest
}

/// Defines a constant for each row, and all of them in [`FINDINGS`].
macro_rules! findings {
    ($($name:ident: $severity:ident, $id:literal, $message:literal, $remedy:literal;)*) => {
        $(pub const $name: Text = Text {
            id: $id,
            severity: Severity::$severity,
            message: $message,
            remedy: $remedy,
        };)*

        /// Every row, in the order of `ids::IDS`.
        pub const FINDINGS: &[Text] = &[$($name),*];
    };
}

findings! {
    // The volume.
    VOLUME_HIBERNATED: Blocker, "volume-hibernated",
        "Windows is hibernated (Fast Startup counts): changing its disk now would damage it",
        "start the guest, run powercfg /h off, then shut it down with shutdown /s /t 0";
    VOLUME_CACHED: Blocker, "volume-cached",
        "Windows did not let go of its NTFS volume (log version 2.0: it ran when the disk was taken, or Fast Startup is on): parts of it may exist only in memory",
        "start the guest, run powercfg /h off, then shut it down with shutdown /s /t 0; --force-dirty-volume does not help here";
    VOLUME_DIRTY: Blocker, "volume-dirty",
        "the NTFS volume of Windows was not unmounted cleanly: writing to it could damage it",
        "start the guest, let it check the disk (chkdsk C: /f), and shut it down with shutdown /s /t 0; --force-dirty-volume writes anyway and loses what was not finished";
    VOLUME_DIRTY_FORCED: Warning, "volume-dirty-forced",
        "the NTFS volume of Windows was not unmounted cleanly and is written all the same: its log is thrown away, and what Windows had not finished writing is lost",
        "let Windows check the disk at the first boot, and compare what matters with a backup";
    VOLUME_UNREADABLE: Warning, "volume-unreadable",
        "the NTFS volume of <partition> cannot be opened: what is on it was not looked at",
        "run chkdsk on it inside the guest";
    DATA_VOLUME_HIBERNATED: Warning, "data-volume-hibernated",
        "another volume holds a hibernated session: its unsaved data is lost when this Windows starts",
        "shut that Windows down completely (shutdown /s /t 0)";
    DATA_VOLUME_DIRTY: Info, "data-volume-dirty",
        "another NTFS volume was not unmounted cleanly: Windows checks it at the next start",
        "none needed; a clean shutdown before the conversion avoids it";
    BITLOCKER: Blocker, "bitlocker",
        "a volume is encrypted with BitLocker: Windows cannot be read, let alone changed<; why>",
        "give its recovery password, its password or its .BEK file with --key (all:file:FILE); or suspend BitLocker in the guest (manage-bde -protectors -disable C: -rc 0) and shut it down: no key is needed then";
    BITLOCKER_CONVERTING: Blocker, "bitlocker-converting",
        "a volume is neither encrypted nor decrypted as a whole<; why>",
        "start the guest, wait until manage-bde -status says 100% or 0% (a paused conversion continues after manage-bde -resume C:), shut it down";
    BITLOCKER_OPENED: Warning, "bitlocker-opened",
        "Windows is encrypted with BitLocker and stays so: its TPM is not in the new VM, so Windows asks for the recovery key at the first boot; backup/ holds hives in clear",
        "suspend BitLocker before the conversion (manage-bde -protectors -disable C: -rc 0) so that both boots pass without it, or keep the recovery key at hand";
    BITLOCKER_SUSPENDED: Warning, "bitlocker-suspended",
        "Windows is encrypted with BitLocker, which is suspended and stays so: whoever has the disk can read it; the TPM of the old VM is not in the new one",
        "none needed for the boots if it was suspended with -rc 0 (else Windows resumes it after the first boot and asks for the recovery password at the second); after the last boot, in the guest: manage-bde -protectors -delete C: -type TPM, manage-bde -protectors -add C: -tpm where the VM has a TPM, manage-bde -protectors -enable C:";
    BITLOCKER_DATA: Warning, "bitlocker-data",
        "a data volume is encrypted with BitLocker: Windows may ask for its recovery key on the new VM",
        "keep the recovery key at hand, or suspend BitLocker before the conversion";
    LUKS: Blocker, "luks",
        "a volume is encrypted with LUKS, and no Windows is outside of it<; why>",
        "give its key with --key (the guestfish engine opens it), or decrypt it";
    DYNAMIC_DISK: Blocker, "dynamic-disk",
        "this is a dynamic disk (LDM): its volumes may span disks, and half of a mirror must not be changed",
        "convert it to a basic disk in the guest, or image the volumes to one";
    STORAGE_SPACES: Blocker, "storage-spaces",
        "the disk is part of a Storage Spaces pool, which is not read here",
        "move the data to an ordinary disk in the guest";
    REFS: Blocker, "refs",
        "a volume is ReFS, which is not read here: a Windows on it cannot be converted",
        "move Windows to NTFS";
    REFS_DATA: Info, "refs-data",
        "a data volume is ReFS: it is copied unchanged and not looked at",
        "none needed";
    EFS: Blocker, "efs",
        "files of Windows are encrypted (EFS): neither this program nor the boot loader can read them",
        "decrypt the Windows directory in the guest (cipher /d /s:C:\\Windows), then shut it down";
    COMPACT_OS: Info, "compact-os",
        "system files are compressed (CompactOS): driver files that are added or replaced are not",
        "none needed";
    COMPRESSED_VOLUME: Info, "compressed-volume",
        "files of Windows are compressed by NTFS: they are read as they are; what is written, hives included, is not compressed",
        "none needed";
    VSS_SNAPSHOTS: Info, "vss-snapshots",
        "shadow copies are on the disk: the free space of their volume is copied too, because they use it",
        "delete them first if they are not needed (vssadmin delete shadows /all)";
    // The hives.
    HIVE_REPLAYED: Info, "hive-replayed",
        "<path> was not saved completely; its logs were replayed, as Windows would do: <entries>",
        "none needed";
    HIVE_STALE: Warning, "hive-stale",
        "<hive> was not saved completely and no log can be replayed (<reasons>). It is sound, but the latest changes to devices, services and settings may be missing",
        "if the guest still runs elsewhere, shut it down from inside and convert again";
    HIVE_LOG_LOST: Warning, "hive-log-lost",
        "<hive>: <why>",
        "if the guest still runs elsewhere, shut it down from inside and convert again";
    HIVE_DAMAGED: Blocker, "hive-damaged",
        "<path> is damaged: Windows could not be made ready to boot from it",
        "repair the guest with chkdsk, or restore the hive from a backup, before converting";
    HIVE_TOO_LARGE: Blocker, "hive-damaged",
        "<file> has <size> MiB, and no sound one has more than <limit> MiB: Windows could not be made ready to boot from it",
        "restore the hive from a backup, or compact it in the guest, before converting";
    HIVE_MISSING: Blocker, "hive-missing",
        "<path> is missing: this Windows does not start anywhere",
        "repair the guest before converting it";
    // Booting.
    NO_BOOT_MANAGER: Blocker, "no-boot-manager",
        "no Windows boot manager was found on this disk: it will not start on its own",
        "convert the disk with the system partition too, or rebuild the boot files with bcdboot";
    BOOT_MANAGER_DAMAGED: Blocker, "boot-manager-damaged",
        "the boot manager of Windows is not an EFI program: a new VM on KVM will not start it",
        "rebuild the boot files with bcdboot from a Windows recovery disk";
    BOOT_MANAGER_UNREAD: Blocker, "boot-manager-damaged",
        "the boot manager of Windows cannot be read: a new VM on KVM will not start it",
        "rebuild the boot files with bcdboot from a Windows recovery disk";
    UEFI_FALLBACK_LINUX: Warning, "uefi-fallback",
        "\\EFI\\BOOT\\BOOTX64.EFI is missing: firmware without the old boot entries finds no boot loader",
        "none needed: convert copies the guest's own loader there";
    UEFI_FALLBACK_MISSING: Info, "uefi-fallback",
        "<path> is missing, and a new VM on KVM starts that file: convert adds it",
        "none needed";
    UEFI_FALLBACK_OTHER: Info, "uefi-fallback",
        "<path> is not Windows' own boot manager, and a new VM on KVM starts that file: convert replaces it",
        "none needed";
    BOOT_FILES_ELSEWHERE: Info, "boot-files-elsewhere",
        "Windows is on disk <number> and its boot files are on disk <number>: both disks are converted as one",
        "none needed";
    FIRMWARE_BOTH: Info, "firmware-both",
        "boot managers for UEFI and for BIOS are on the disk; the partition table decided",
        "none needed; if the guest does not start, set the firmware in the domain XML";
    ACTIVE_PARTITION_NONE: Warning, "active-partition",
        "no partition is active: a BIOS does not start this disk",
        "mark exactly the system partition active (diskpart: select partition N, active)";
    ACTIVE_PARTITION_SEVERAL: Warning, "active-partition",
        "several partitions are active: a BIOS refuses such a partition table",
        "mark exactly the system partition active (diskpart: select partition N, active)";
    GPT_BLANK_ENTRY: Warning, "gpt-blank-entry",
        "a blank entry precedes the EFI system partition in the GPT: some boot managers look no further and stop",
        "sort the table (sgdisk --sort DISK on a copy of the disk); Windows does not mind";
    BOOT_SECTOR_HIDDEN: Warning, "boot-sector-hidden",
        "the boot sector does not know where its partition starts (hidden sectors): the BIOS boot code will not find bootmgr",
        "convert with --repair-bcd, or run bootsect /nt60 ALL (NT 6) or fixboot (XP) from a Windows recovery disk";
    BOOT_SECTOR_HEADS: Info, "boot-sector-heads",
        "the boot sector has another number of heads than a VM on KVM shows, and Windows XP and 2003 stop at that (\"A disk read error occurred\"): convert sets it",
        "none needed";
    BOOT_SECTOR_GEOMETRY: Warning, "boot-sector-geometry",
        "which number of heads a VM on KVM shows for this disk is not known: Windows XP and 2003 stop with \"A disk read error occurred\" when the boot sector has another one",
        "if that happens, start the new VM from the Windows CD and run fixboot, or enlarge the disk to 9 GiB and convert again";
    NO_BCD: Blocker, "no-bcd",
        "the boot configuration is missing: the boot manager will not find Windows",
        "rebuild it with bcdboot from a Windows recovery disk";
    NO_BOOT_INI: Warning, "no-boot-ini",
        "boot.ini is missing: NTLDR starts \\WINDOWS on the first partition and nothing else",
        "write a boot.ini that names the partition of Windows, unless that is right";
    BOOT_INI_DEVICE: Blocker, "boot-ini-device",
        "the default entry of boot.ini <problem>: NTLDR finds no Windows there",
        "on the old host, let the default entry and the list below it in boot.ini name <path>";
    BCD_DAMAGED: Warning, "bcd-damaged",
        "the boot configuration (BCD) is damaged: the boot manager may not find Windows",
        "rebuild it with bcdboot from a Windows recovery disk";
    BCD_NO_DEFAULT: Warning, "bcd-no-default",
        "the boot configuration names no Windows to start by default",
        "set one inside the guest: bcdedit /default {current}";
    BCD_TRANSIENT: Warning, "bcd-transient",
        "the default boot entry starts setup or recovery, not Windows",
        "let it finish on the old host, or set the default: bcdedit /default {current}";
    BCD_DEVICE: Blocker, "bcd-device",
        "the default boot entry's <element> names a partition that is not on <disks>: the boot manager stops with 0xc000000e",
        "convert with --repair-bcd, or run bcdboot from a Windows recovery disk";
    BCD_LOADER: Blocker, "bcd-loader",
        "the loader <path> of the default boot entry is missing: Windows does not start",
        "repair the boot files in the guest (bcdboot C:\\Windows)";
    BCD_LOADER_UNNAMED: Blocker, "bcd-loader",
        "the default boot entry names no loader: Windows does not start",
        "rebuild the boot files with bcdboot from a Windows recovery disk";
    BCD_LOADER_FIRMWARE: Warning, "bcd-loader-firmware",
        "the default boot entry names <path>, but this disk boots with a .<extension> loader",
        "set the firmware of the VM to the one Windows was installed with, or run bcdboot";
    BCD_OTHER_WINDOWS: Info, "bcd-other-windows",
        "the default boot entry starts the Windows on <partition>, not the one converted",
        "none needed if both are wanted; bcdedit /default changes it";
    BCD_TEXT_MODE: Info, "bcd-text-mode",
        "the boot entry forces text mode, which shows nothing on a VM with UEFI: it is removed",
        "none needed";
    EMS_COM1: Info, "ems-com1",
        "Windows gives COM1 to its emergency console (EMS, SAC): the new VM has a second serial port, and the first-boot script reports there",
        "none needed";
    DEBUG_COM1: Info, "debug-com1",
        "Windows gives COM1 to its kernel debugger: the new VM has a second serial port, and the first-boot script reports there",
        "none needed";
    DEFAULT_CONTROL_SET: Blocker, "default-control-set",
        "<name> is to be started and is not in the SYSTEM hive: the boot loader stops there",
        "start the guest on its old host with the last known good configuration (F8), and shut it down";
    // Windows.
    PENDING_UPDATES: Warning, "pending-updates",
        "updates wait for the next start: they run on the new VM, and may replace driver files",
        "restart the guest until no update is pending, then shut it down";
    PENDING_REBOOT: Warning, "pending-reboot",
        "Windows waits for a restart to finish an update: it finishes on the new VM, with restarts of its own",
        "restart the guest once more before the conversion";
    PENDING_RENAMES: Info, "pending-renames",
        "files wait to be renamed or deleted at the next start",
        "none needed";
    SETUP_IN_PROGRESS: Warning, "setup-in-progress",
        "Windows setup is not finished (a sysprepped image looks like this too): the first boot continues it",
        "expected for a template; otherwise let setup finish before the conversion";
    DEVICE_INSTALL_POLICY: Warning, "device-install-policy",
        "a group policy restricts device installation: Windows may refuse the new disk and network devices",
        "exempt the virtio devices (PCI\\VEN_1AF4) from the policy before the conversion";
    ANTIVIRUS: Warning, "antivirus",
        "a virus scanner with boot drivers of its own is installed: it may block the first start of new drivers",
        "if the first boot fails, convert again after pausing its self-protection";
    CLUSTER_NODE: Warning, "cluster-node",
        "this is a failover cluster node: shared disks are not part of this image",
        "evict the node first, or attach the shared disks to the new VM by hand";
    DOMAIN_CONTROLLER: Warning, "domain-controller",
        "this is a domain controller: never run the old and the new VM at the same time",
        "keep the old VM off for good; other domain controllers must be reachable at first boot";
    VBS_MANDATORY: Warning, "vbs-mandatory",
        "virtualization-based security is mandatory: Windows stops at boot on a VM without nested virtualization",
        "run it on a host that offers nested virtualization to its guests (CPU host-passthrough), or set Control\\DeviceGuard Mandatory to 0 before the conversion";
    // No Windows to convert.
    LINUX: Blocker, "linux",
        "this is a Linux disk (<file systems>), not a Windows one",
        "use virt-v2v, or attach the disk unchanged to a VM on KVM: Linux has its own virtio drivers";
    NO_WINDOWS: Blocker, "no-windows",
        "there is no Windows on this disk, only data (<file systems>)",
        "convert the disk from which Windows starts; attach a data disk unchanged";
    NO_PARTITION_TABLE: Blocker, "no-partition-table",
        "the disk has neither a partition table nor a file system: it is empty, encrypted as a whole, or not a disk image",
        "check that this is the right file, and its format";
    EMPTY_DISK: Blocker, "empty-disk",
        "the partition table is empty: there is nothing to convert",
        "convert the disk Windows starts from";
    NO_FILE_SYSTEM: Blocker, "no-file-system",
        "no partition has a known file system: the disk is not formatted, or encrypted",
        "check that this is the right disk; decrypt it in the guest if it is encrypted";
    UNKNOWN_WINDOWS: Blocker, "unknown-windows",
        "the hives do not identify this Windows: no driver can be chosen for it",
        "check that the guest starts, and that its hives are whole";
    UNKNOWN_ARCHITECTURE: Blocker, "unknown-architecture",
        "the processor architecture of this Windows (build <number>) is not known: no driver can be chosen for it",
        "check that Windows is for x86, x64 or ARM64, and that System32\\ntoskrnl.exe is whole";
    NO_CONTROL_SET: Blocker, "no-control-set",
        "the SYSTEM hive names no control set that exists: this Windows does not start anywhere",
        "repair the guest, or restore its SYSTEM hive from a backup";
    // Linux.
    LINUX_ARCH: Blocker, "linux-arch",
        "this Linux is for ARM: the VMs made here are x86",
        "convert it with virt-v2v on an ARM host";
    LINUX_ENCRYPTED: Blocker, "linux-encrypted",
        "the root file system is encrypted (LUKS on <devices>)",
        "convert it with virt-v2v and its option --key, or decrypt the disk in the guest";
    LINUX_HIBERNATED: Blocker, "linux-hibernated",
        "the guest is hibernated: on another VM it would continue with hardware that is gone, and lose data",
        "start it once where it was, and shut it down";
    LINUX_NOT_CLEAN: Warning, "linux-not-clean",
        "a file system was not unmounted: the guest crashed or still runs, and Linux will replay its journal",
        "shut the guest down from inside and convert again, unless this is all there is";
    LINUX_ROOT_UNREAD: Blocker, "linux-root-unread",
        "<why>, which only libguestfs reads here, and guestfish is not installed",
        "<how to install it>";
    LINUX_ROOT_UNREAD_EMBEDDED: Blocker, "linux-root-unread",
        "<why>, which only the libguestfs appliance reads, and --engine embedded does without one",
        "leave --engine out, or use --engine guestfish";
    LINUX_NO_BOOT_LOADER: Warning, "linux-no-boot-loader",
        "no boot loader was found at the start of the first disk, and none on an EFI system partition: the VM will not start on its own",
        "put the disk it starts from first, or install the boot loader again from a rescue system";
    LINUX_DEVICE_NAME: Warning, "linux-device-name",
        "/etc/fstab names <devices>: such names change with the controller",
        "name them by UUID in the guest; virt-v2v does that too";
    LINUX_INTERFACE_NAME: Warning, "linux-interface-name",
        "the network is configured for <names>, and names made from the slot of a NIC change with the VM (the first NIC becomes enp6s0): the addresses would not be set",
        "match the NIC by its MAC address in these files, which stays the same, or put the new name there from the console";
    LINUX_FREE_SPACE: Info, "linux-free-space",
        "free space of Linux file systems is copied unchanged",
        "none needed; fstrim -av in the guest before makes the copy smaller";
    NO_LINUX: Blocker, "no-linux",
        "no Linux installation was found on these disks",
        "name the disk the VM starts from, and with a VM of several disks its description (.vmx, .ovf, libvirt XML)";
    SEVERAL_LINUX: Blocker, "several-linux",
        "more than one Linux is installed: <list>",
        "convert a VM with one; remove the others, or convert it with virt-v2v and its option --root";
}

#[cfg(test)]
#[path = "findings_tests.rs"]
mod tests;
