//! What is said about each state, word for word.

use serde_json::Value;

struct Row {
    id: &'static str,
    severity: &'static str,
    message: &'static str,
    remedy: &'static str,
}

const fn row(
    id: &'static str,
    severity: &'static str,
    message: &'static str,
    remedy: &'static str,
) -> Row {
    Row {
        id,
        severity,
        message,
        remedy,
    }
}

const ROWS: &[Row] = &[
    row(
        "volume-hibernated",
        "blocker",
        "Windows is hibernated (Fast Startup counts): changing its disk now would damage it",
        "start the guest, run powercfg /h off, then shut it down with shutdown /s /t 0",
    ),
    row(
        "volume-cached",
        "blocker",
        "Windows did not let go of its NTFS volume (log version 2.0: it ran when the disk was taken, or Fast Startup is on): parts of it may exist only in memory",
        "start the guest, run powercfg /h off, then shut it down with shutdown /s /t 0; --force-dirty-volume does not help here",
    ),
    row(
        "volume-dirty",
        "blocker",
        "the NTFS volume of Windows was not unmounted cleanly: writing to it could damage it",
        "start the guest, let it check the disk (chkdsk C: /f), and shut it down with shutdown /s /t 0; --force-dirty-volume writes anyway and loses what was not finished",
    ),
    row(
        "volume-dirty-forced",
        "warning",
        "the NTFS volume of Windows was not unmounted cleanly and is written all the same: its log is thrown away, and what Windows had not finished writing is lost",
        "let Windows check the disk at the first boot, and compare what matters with a backup",
    ),
    row(
        "data-volume-hibernated",
        "warning",
        "another volume holds a hibernated session: what that Windows had open is lost when this one starts",
        "shut that Windows down completely (shutdown /s /t 0)",
    ),
    row(
        "data-volume-dirty",
        "info",
        "another NTFS volume was not unmounted cleanly: Windows checks it at the next start",
        "none needed; a clean shutdown before the conversion avoids it",
    ),
    row(
        "bitlocker",
        "blocker",
        "a volume is encrypted with BitLocker: Windows cannot be read, let alone changed",
        "give its recovery password, its password or its .BEK file with --key (all:file:FILE); or suspend BitLocker in the guest (manage-bde -protectors -disable C: -rc 0) and shut it down: no key is needed then",
    ),
    row(
        "bitlocker-converting",
        "blocker",
        "a volume is neither encrypted nor decrypted as a whole",
        "start the guest, wait until manage-bde -status says 100% or 0% (a paused conversion goes on after manage-bde -resume C:), shut it down",
    ),
    row(
        "bitlocker-opened",
        "warning",
        "Windows is encrypted with BitLocker and stays so: its TPM is not in the new machine, so Windows asks for the recovery key at the first boot; backup/ holds hives in clear",
        "suspend BitLocker before the conversion (manage-bde -protectors -disable C: -rc 0) so that both boots pass without it, or keep the recovery key at hand",
    ),
    row(
        "bitlocker-suspended",
        "warning",
        "Windows is encrypted with BitLocker, which is suspended and stays so: whoever has the disk can read it; the TPM of the old machine is not in the new one",
        "none needed for the boots if it was suspended with -rc 0 (else Windows resumes it after the first boot and asks for the recovery password at the second); after the last boot, in the guest: manage-bde -protectors -delete C: -type TPM, manage-bde -protectors -add C: -tpm where the machine has a TPM, manage-bde -protectors -enable C:",
    ),
    row(
        "bitlocker-data",
        "warning",
        "a data volume is encrypted with BitLocker: Windows may ask for its recovery key on the new machine",
        "keep the recovery key at hand, or suspend BitLocker before the conversion",
    ),
    row(
        "dynamic-disk",
        "blocker",
        "this is a dynamic disk (LDM): its volumes may span disks, and half of a mirror must not be changed",
        "convert it to a basic disk in the guest, or image the volumes to one",
    ),
    row(
        "storage-spaces",
        "blocker",
        "the disk is part of a Storage Spaces pool, which is not read here",
        "move the data to an ordinary disk in the guest",
    ),
    row(
        "luks",
        "blocker",
        "a volume is encrypted with LUKS, and no Windows is outside of it",
        "give its key with --key (the guestfish engine opens it), or decrypt it",
    ),
    row(
        "refs",
        "blocker",
        "a volume is ReFS, which is not read here: a Windows on it cannot be converted",
        "move Windows to NTFS",
    ),
    row(
        "refs-data",
        "info",
        "a data volume is ReFS: it is copied as it is and not looked at",
        "none needed",
    ),
    row(
        "efs",
        "blocker",
        "files of Windows are encrypted (EFS): neither this program nor the boot loader can read them",
        "decrypt the Windows folder in the guest (cipher /d /s:C:\\Windows), then shut it down",
    ),
    row(
        "compressed-volume",
        "info",
        "files of Windows are compressed by NTFS: they are read as they are; what is written, hives included, is not compressed",
        "none needed",
    ),
    row(
        "compact-os",
        "info",
        "system files are compressed (CompactOS): driver files that are added or replaced are not",
        "none needed",
    ),
    row(
        "vss-snapshots",
        "info",
        "shadow copies are on the disk: the free space of their volume is copied too, because they use it",
        "delete them first if they are not needed (vssadmin delete shadows /all)",
    ),
    row(
        "hive-replayed",
        "info",
        "\\EFI\\Microsoft\\Boot\\BCD was not saved completely; its logs were replayed, as Windows would do: 1 entry",
        "none needed",
    ),
    row(
        "hive-replayed",
        "info",
        "\\Windows\\System32\\config\\SYSTEM was not saved completely; its logs were replayed, as Windows would do: 1 entry",
        "none needed",
    ),
    row(
        "hive-stale",
        "warning",
        "DRIVERS was not saved completely and no log can be replayed (DRIVERS.LOG1: the log is empty; DRIVERS.LOG2: the log is empty). It is sound, but the latest changes to devices, services and settings may be missing",
        "if the guest still runs elsewhere, shut it down from inside and convert again",
    ),
    row(
        "hive-stale",
        "warning",
        "SOFTWARE was not saved completely and no log can be replayed (SOFTWARE.LOG1: the log is empty; SOFTWARE.LOG2: the log is empty). It is sound, but the latest changes to devices, services and settings may be missing",
        "if the guest still runs elsewhere, shut it down from inside and convert again",
    ),
    row(
        "hive-stale",
        "warning",
        "SYSTEM was not saved completely and no log can be replayed (SYSTEM.LOG1: the log is empty; SYSTEM.LOG2: the log is empty). It is sound, but the latest changes to devices, services and settings may be missing",
        "if the guest still runs elsewhere, shut it down from inside and convert again",
    ),
    row(
        "hive-damaged",
        "blocker",
        "\\Windows\\System32\\config\\SYSTEM is damaged: Windows could not be made ready to boot from it",
        "repair the guest with chkdsk, or restore the hive from a backup, before converting",
    ),
    row(
        "hive-missing",
        "blocker",
        "\\Windows\\System32\\config\\SYSTEM is missing: this Windows does not start anywhere",
        "repair the guest before converting it",
    ),
    row(
        "hive-log-lost",
        "warning",
        "SYSTEM: the hive is clean at sequence number 5, but SYSTEM.LOG2 goes on to 7: some program saved the hive without replaying its logs, and their changes are lost",
        "if the guest still runs elsewhere, shut it down from inside and convert again",
    ),
    row(
        "uefi-fallback",
        "info",
        "\\EFI\\Boot\\BOOTX64.EFI is missing, and a new KVM machine starts that file: convert adds it",
        "none needed",
    ),
    row(
        "uefi-fallback",
        "info",
        "\\EFI\\Boot\\BOOTX64.EFI is not Windows' own boot manager, and a new KVM machine starts that file: convert replaces it",
        "none needed",
    ),
    row(
        "boot-manager-damaged",
        "blocker",
        "the boot manager of Windows is not an EFI program: a new KVM machine will not start it",
        "rebuild the boot files with bcdboot from a Windows recovery disk",
    ),
    row(
        "no-boot-manager",
        "blocker",
        "no Windows boot manager was found on this disk: it will not start by itself",
        "convert the disk that holds the system partition too, or rebuild the boot files with bcdboot",
    ),
    row(
        "ems-com1",
        "info",
        "Windows gives COM1 to its emergency console (EMS, SAC): the new machine has a second serial port, and the first-boot script reports there",
        "none needed",
    ),
    row(
        "bcd-text-mode",
        "info",
        "the boot entry forces text mode, which shows nothing on a KVM machine with UEFI: it is removed",
        "none needed",
    ),
    row(
        "bcd-device",
        "blocker",
        "the default boot entry's device names a partition that is not on this disk: the boot manager stops with 0xc000000e",
        "convert with --repair-bcd, or run bcdboot from a Windows recovery disk",
    ),
    row(
        "bcd-loader",
        "blocker",
        "the loader \\Windows\\system32\\winload.exe of the default boot entry is missing: Windows does not start",
        "repair the boot files in the guest (bcdboot C:\\Windows)",
    ),
    row(
        "bcd-loader-firmware",
        "warning",
        "the default boot entry names \\Windows\\system32\\winload.exe, but this disk boots with a .efi loader",
        "set the firmware of the machine to the one Windows was installed with, or run bcdboot",
    ),
    row(
        "bcd-other-windows",
        "info",
        "the default boot entry starts the Windows on partition 4, not the one converted",
        "none needed if both are wanted; bcdedit /default changes it",
    ),
    row(
        "bcd-damaged",
        "warning",
        "the boot configuration (BCD) is damaged: the boot manager may not find Windows",
        "rebuild it with bcdboot from a Windows recovery disk",
    ),
    row(
        "no-bcd",
        "blocker",
        "the boot configuration is missing: the boot manager will not find Windows",
        "rebuild it with bcdboot from a Windows recovery disk",
    ),
    row(
        "no-boot-ini",
        "warning",
        "boot.ini is missing: NTLDR starts \\WINDOWS on the first partition and nothing else",
        "write a boot.ini that names the partition of Windows, unless that is right",
    ),
    row(
        "default-control-set",
        "blocker",
        "ControlSet009 is to be started and is not in the SYSTEM hive: the boot loader stops there",
        "start the guest on its old host with the last known good configuration (F8), and shut it down",
    ),
    row(
        "bcd-no-default",
        "warning",
        "the boot configuration names no Windows to start by default",
        "set one inside the guest: bcdedit /default {current}",
    ),
    row(
        "bcd-transient",
        "warning",
        "the default boot entry starts setup or recovery, not Windows",
        "let it finish on the old host, or set the default: bcdedit /default {current}",
    ),
    row(
        "active-partition",
        "warning",
        "no partition is active: a BIOS does not start this disk",
        "mark exactly the system partition active (diskpart: select partition N, active)",
    ),
    row(
        "active-partition",
        "warning",
        "several partitions are active: a BIOS refuses such a partition table",
        "mark exactly the system partition active (diskpart: select partition N, active)",
    ),
    row(
        "gpt-blank-entry",
        "warning",
        "a blank entry precedes the EFI system partition in the GPT: some boot managers look no further and stop",
        "sort the table (sgdisk --sort DISK on a copy of the disk); Windows does not mind",
    ),
    row(
        "boot-sector-hidden",
        "warning",
        "the boot sector does not know where its partition starts (hidden sectors): the BIOS boot code will not find bootmgr",
        "convert with --repair-bcd, or run bootsect /nt60 ALL (NT 6) or fixboot (XP) from a Windows recovery disk",
    ),
    row(
        "boot-sector-heads",
        "info",
        "the boot sector has another number of heads than a KVM machine shows, and Windows XP and 2003 stop at that (\"A disk read error occurred\"): convert sets it",
        "none needed",
    ),
    row(
        "boot-sector-geometry",
        "warning",
        "which number of heads a KVM machine shows for this disk is not known: Windows XP and 2003 stop with \"A disk read error occurred\" when the boot sector has another one",
        "if that happens, start the new machine from the Windows CD and run fixboot, or enlarge the disk to 9 GiB and convert again",
    ),
    row(
        "pending-updates",
        "warning",
        "updates wait for the next start: they run on the new machine, and may replace driver files",
        "restart the guest until no update is pending, then shut it down",
    ),
    row(
        "pending-reboot",
        "warning",
        "Windows waits for a restart to finish an update: it finishes on the new machine, with restarts of its own",
        "restart the guest once more before the conversion",
    ),
    row(
        "pending-renames",
        "info",
        "files wait to be renamed or deleted at the next start",
        "none needed",
    ),
    row(
        "setup-in-progress",
        "warning",
        "Windows setup is not finished (a sysprepped image looks like this too): the first boot continues it",
        "expected for a template; otherwise let setup finish before the conversion",
    ),
    row(
        "device-install-policy",
        "warning",
        "a group policy restricts device installation: Windows may refuse the new disk and network devices",
        "exempt the virtio devices (PCI\\VEN_1AF4) from the policy before the conversion",
    ),
    row(
        "antivirus",
        "warning",
        "a virus scanner with boot drivers of its own is installed: it may block the first start of new drivers",
        "if the first boot fails, convert again after pausing its self-protection",
    ),
    row(
        "cluster-node",
        "warning",
        "this is a failover cluster node: shared disks are not part of this image",
        "evict the node first, or attach the shared disks to the new machine by hand",
    ),
    row(
        "domain-controller",
        "warning",
        "this is a domain controller: never run the old and the new machine at the same time",
        "keep the old machine off for good; other domain controllers must be reachable at first boot",
    ),
    row(
        "debug-com1",
        "info",
        "Windows gives COM1 to its kernel debugger: the new machine has a second serial port, and the first-boot script reports there",
        "none needed",
    ),
    row(
        "vbs-mandatory",
        "warning",
        "virtualization-based security is mandatory: Windows stops at boot on a machine without nested virtualization",
        "run it on a host that offers nested virtualization to its guests (CPU host-passthrough), or set Control\\DeviceGuard Mandatory to 0 before the conversion",
    ),
    row(
        "boot-files-elsewhere",
        "info",
        "Windows is on disk 2 and its boot files are on disk 1: both disks are converted as one",
        "none needed",
    ),
    row(
        "several-windows",
        "blocker",
        "several Windows installations: 1/3:\\Windows, 2/3:\\Windows",
        "name one with --root, as it is listed here",
    ),
    row(
        "boot-ini-device",
        "blocker",
        "the default entry of boot.ini names disk rdisk(1), and the VM has one disk: NTLDR finds no Windows there",
        "on the old host, let the default entry and the list below it in boot.ini name multi(0)disk(0)rdisk(0)partition(1)\\WINDOWS",
    ),
    row(
        "guest-space",
        "blocker",
        "partition N of the guest has SIZE free, and the fix writes up to SIZE to it",
        "delete files in the guest (cleanmgr, the recycle bin) or enlarge the volume, shut the guest down, and convert again",
    ),
    row(
        "driver-missing",
        "blocker",
        "folder MEDIA has no viostor driver for Windows Server 2003 or XP x64 (x86): looked for 2k3, found w10, w7, w8, w8.1",
        "use virtio-win 0.1.173 or older and pass it with --virtio-iso",
    ),
    row(
        "driver-missing",
        "blocker",
        "folder MEDIA has no viostor driver for Windows Vista or Server 2008 (x86_64): looked for 2k8, found 2k12, 2k12R2, 2k16, 2k19, 2k22, 2k25, 2k8R2, w10, w11, w7, w8, w8.1",
        "use virtio-win 0.1.173 or older and pass it with --virtio-iso",
    ),
    row(
        "driver-missing",
        "blocker",
        "folder MEDIA has no viostor driver for Windows XP (x86): looked for xp, found w10, w7, w8, w8.1",
        "use virtio-win 0.1.173 or older and pass it with --virtio-iso",
    ),
    row(
        "driver-not-signed",
        "blocker",
        "viostor 63.266.104.26600 in viostor/w8.1/amd64 is not usable on Windows 8.1: later releases sign it for testing only, and 64-bit Windows refuses to load it (0xC0000428)",
        "use virtio-win 0.1.215 or older and pass it with --virtio-iso",
    ),
    row(
        "storage-driver",
        "blocker",
        "there is no virtio-scsi driver for this Windows",
        "leave --storage out, or name the other one",
    ),
];

/// The run ended with exit code 3 and this blocker.
#[track_caller]
pub fn assert_refusal(id: &str, run: &crate::support::Run) {
    assert_eq!(run.code, 3, "{}", run.stderr);
    let error = run.json();
    assert_eq!(error["error"]["code"], 3);
    let blockers = &error["error"]["blockers"];
    let blocker = crate::find(blockers, "code", id);
    let blocker = blocker.unwrap_or_else(|| panic!("{id}: {blockers:#}"));
    let media = crate::support::virtio_win().to_str().unwrap();
    let said = serde_json::json!({
        "severity": "blocker",
        "message": without_numbers(id, &blocker["reason"].as_str().unwrap().replace(media, "MEDIA")),
        "remedy": blocker["remedy"],
    });
    assert_row(id, &said);
}

/// What differs from run to run.
fn without_numbers(id: &str, message: &str) -> String {
    if id != "guest-space" {
        return message.to_string();
    }
    let mut words: Vec<&str> = message.split(' ').collect();
    for i in 0..words.len() - 1 {
        if words[i + 1].ends_with("iB") || words[i + 1] == "B" || words[i + 1] == "bytes" {
            (words[i], words[i + 1]) = ("SIZE", "");
        } else if words[i] == "volume" || words[i] == "partition" {
            words[i + 1] = "N";
        }
    }
    words.retain(|word| !word.is_empty());
    words.join(" ")
}

#[track_caller]
pub fn assert_row(id: &str, found: &Value) {
    let is = |row: &&Row| {
        // Why a volume stays closed follows what is said of all of them.
        let message = found["message"].as_str().unwrap_or_default();
        let why = message.strip_prefix(row.message).unwrap_or("another");
        row.severity == found["severity"]
            && (why.is_empty() || row.id.starts_with("bitlocker") && why.starts_with("; "))
            && row.remedy == found["remedy"]
    };
    let known = ROWS.iter().filter(|row| row.id == id).any(|row| is(&row));
    assert!(known, "{id} says something else than the table: {found:#}");
}

/// `docs/guests.md` has each row, with the same severity and remedy and the test that shows it, and names
/// every finding of `inspect`.
#[test]
fn the_document_is_this_table() {
    let doc = include_str!("../../docs/guests.md");
    let tests = [
        include_str!("agree.rs"),
        include_str!("boot.rs"),
        include_str!("hives.rs"),
        include_str!("old.rs"),
        include_str!("several.rs"),
        include_str!("volumes.rs"),
        include_str!("windows.rs"),
    ];
    let mut documented = Vec::new();
    for line in doc.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["", _, id, what, _, remedy, test, ""] = cells[..] else {
            continue;
        };
        if matches!(id, "id" | "---") {
            continue;
        }
        let (id, test) = (id.trim_matches('`'), test.trim_matches('`'));
        let severity = match what.split(|c: char| !c.is_alphabetic()).next() {
            Some("refused") => "blocker",
            Some("warned") => "warning",
            Some("told") => "info",
            other => panic!("{id}: {other:?}"),
        };
        let rows: Vec<&Row> = ROWS.iter().filter(|row| row.id == id).collect();
        assert!(!rows.is_empty(), "{id} is not in the table");
        for row in rows {
            assert_eq!((row.severity, row.remedy), (severity, remedy), "{id}");
        }
        let (function, mention) = (format!("fn {test}("), format!("\"{id}\""));
        let shown = |file: &&str| file.contains(&function) && file.contains(&mention);
        assert!(tests.iter().any(shown), "{id}: {test}");
        documented.push(id);
    }
    for row in ROWS {
        assert!(documented.contains(&row.id), "{} is not documented", row.id);
    }
    let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/inspect");
    for file in std::fs::read_dir(source).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        for made in text.split("Finding::").skip(1) {
            let id = made.split_once('(').and_then(|(kind, rest)| {
                let known = ["info", "warning", "blocker"].contains(&kind);
                known.then(|| rest.trim_start().strip_prefix('"')?.split('"').next())?
            });
            if let Some(id) = id {
                assert!(doc.contains(&format!("`{id}`")), "{id} is not documented");
            }
        }
    }
}
