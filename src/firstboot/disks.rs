//! Data disks whose volumes had a drive letter, for the step that brings them online.
//!
//! On a new controller a disk is new to Windows, and its SAN policy may leave it offline. Servers
//! do that on a bus that they consider shared. The policy is not changed. Only disks that were
//! certainly in use are brought online, identified by their signature or GUID. `diskpart` prints
//! these for offline disks too, and in the same form in every language.

use std::fmt::{self, Write as _};

use uuid::fmt::Braced;

/// The identity of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskId {
    /// The signature in its MBR.
    Mbr(u32),
    Gpt(uuid::Uuid),
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mbr(signature) => write!(f, "{signature:08X}"),
            Self::Gpt(guid) => write!(f, "{:X}", guid.braced()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub id: DiskId,
    /// Whether it was set read-only, and stays so.
    pub read_only: bool,
    /// Each letter with its volume: `\\?\Volume{...}`.
    pub letters: Vec<(char, Braced)>,
}

/// The disks to bring online.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disks(pub Vec<Disk>);

impl Disks {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The commands. They try the disks by number, until four numbers in a row do not exist.
    pub(super) fn to_cmd(&self) -> String {
        let mut text = String::from(SEARCH);
        for (i, disk) in self.0.iter().enumerate() {
            let _ = writeln!(
                text,
                "if not \"%LINE:{}=%\"==\"%LINE%\" set \"ID={}\"",
                disk.id,
                i + 1
            );
        }
        text.push_str("exit /b 0\n");
        for (i, disk) in self.0.iter().enumerate() {
            let keep = if disk.read_only { " keep" } else { "" };
            let _ = writeln!(text, "\n:disk_{}\ncall :online{keep}", i + 1);
            for (letter, volume) in &disk.letters {
                let letter = letter.to_ascii_uppercase();
                // From `char`: only a letter gets into the script.
                if letter.is_ascii_uppercase() {
                    let _ = writeln!(text, "call :letter {letter} {volume}");
                }
            }
            text.push_str("exit /b 0\n");
        }
        text
    }
}

const SEARCH: &str = r#"set "N=0"
set "MISSED=0"
:disks_next
>"%DIR%disk.txt" echo select disk %N%
>>"%DIR%disk.txt" echo uniqueid disk
%SYS%\diskpart.exe /s "%DIR%disk.txt" >"%DIR%disk.log" 2>&1
set "E=%ERRORLEVEL%"
if "%E%"=="0" set "MISSED=0"
if not "%E%"=="0" set /a MISSED+=1
set "ID="
for /f "usebackq delims=" %%a in ("%DIR%disk.log") do set "LINE=%%a" & call :disk_id
if defined ID call :disk_%ID%
set /a N+=1
if %MISSED% lss 4 if %N% lss 64 goto disks_next
exit /b %BAD%

rem Which of our disks LINE names.
:disk_id
"#;
