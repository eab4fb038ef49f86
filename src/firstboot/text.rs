//! The constant parts of the script.
//!
//! Values provided by a running Windows (names, paths) are read with `for /f` into variables. They
//! lose their quotation marks there, and are used between quotation marks only. So cmd interprets
//! nothing in them.

pub(super) const HEAD: &str = r#"@echo off
rem Written by hyper2kvm. What this does, and how to stop it: hyper2kvm docs first-boot
setlocal EnableExtensions DisableDelayedExpansion
rem Programs are named with their directory; what they start is looked for in PATH only, not in the directory one
rem happens to be in.
set "SYS=%SystemRoot%\System32"
set "NoDefaultCurrentDirectoryInExePath=1"
set "PATH=%SystemRoot%\System32;%SystemRoot%;%SystemRoot%\System32\Wbem"
set "DIR=%~dp0"
set "LOG=%DIR%firstboot.log"
set "CCS=HKLM\SYSTEM\CurrentControlSet"
set "SVC=hyper2kvm-firstboot"
set "BAD=0"
set "PORT=@PORT@"
if "%~1"=="add-driver" goto add_driver
if "%~1"=="add-agent" goto add_agent
if "%~1"=="uninstall" goto uninstall
cd /d "%SystemDrive%\"
%SYS%\mode.com %PORT%: BAUD=115200 PARITY=n DATA=8 STOP=1 >nul 2>&1
set "TRY=0"
if exist "%DIR%tries" set /p TRY=<"%DIR%tries"
set /a TRY+=1
>"%DIR%tries" echo %TRY%
call :say started, boot %TRY% of at most @MAX@
if %TRY% gtr @MAX@ goto finish
"#;

/// virtio-blk disks are `Disk&Ven_Red_Hat&Prod_VirtIO`, virtio-scsi ones `Disk&Ven_QEMU&Prod_QEMU_HARDDISK`;
/// behind AHCI and IDE it is `Disk&Ven_QEMU&Prod_HARDDISK` or `IDE\DiskQEMU_HARDDISK`.
pub(super) const TWO_BOOTS: &str = r#"set "EMULATED="
for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Services\disk\Enum" 2^>nul') do if "%%b"=="REG_SZ" set "DISK=%%c" & call :disk
if not defined EMULATED goto last
call :log the disks are not on VirtIO yet: the rest follows at the next boot
rem On another controller they are new disks to Windows.
del /q "%DIR%done.disks" >nul 2>&1
goto end
"#;

pub(super) const ONE_BOOT: &str = "goto last\n";

/// `sc delete` takes effect immediately, because for the service manager the service is not
/// running.
pub(super) const TAIL: &str = r#"%SYS%\sc.exe delete %SVC% >>"%LOG%" 2>&1
call :ran remove the service
del /q "%DIR%done.*" "%DIR%tries" "%DIR%rc" "%DIR%install.log" "%DIR%disk.txt" "%DIR%disk.log" "%DIR%user-*.cmd" "%DIR%qemu-ga.msi" >nul 2>&1
call :say first boot finished
rem The line has been read when the script goes.
del /q "%~f0" >nul 2>&1 & exit 0

:end
call :say first boot finished
exit /b 0
"#;

/// Windows continues installing devices after the services have started.
pub(super) const PNP: &str = r#"set "POLL=0"
set "IDLE=0"
:pnp_poll
set /a POLL+=1
%SYS%\ping.exe -n 6 127.0.0.1 >nul 2>&1
set /a IDLE+=1
for /f "tokens=1" %%a in ('%SYS%\tasklist.exe 2^>nul') do if /i "%%a"=="drvinst.exe" set "IDLE=0"
if %IDLE% geq 2 exit /b 0
if %POLL% lss 60 goto pnp_poll
call :log devices are still being installed after five minutes, going on
set "BAD=258"
"#;

pub(super) const AGENT_STEP: &str = r#"%SYS%\reg.exe query "%CCS%\Services\QEMU-GA" >nul 2>&1 && exit /b 0
call :watched add-agent
exit /b %BAD%

:add_agent
%SYS%\msiexec.exe /i "%DIR%qemu-ga.msi" /qn /norestart >"%DIR%install.log" 2>&1
goto installed
"#;

pub(super) const ROUTINES: &str = r#"
rem Runs a step unless an earlier boot did it.
:step
if exist "%DIR%done.%~1" exit /b 0
set "BAD=0"
call :log step %~1
call :s_%~1
set "RC=%ERRORLEVEL%"
if "%RC%"=="0" >"%DIR%done.%~1" echo %RC%
call :say step %~1 rc=%RC%
exit /b 0

rem EMULATED when DISK is a disk that is not on VirtIO.
:disk
if not "%DISK:Ven_Red_Hat=%"=="%DISK%" exit /b 0
if not "%DISK:Prod_QEMU_HARDDISK=%"=="%DISK%" exit /b 0
if not "%DISK:\Disk=%"=="%DISK%" set "EMULATED=1"
exit /b 0

rem Files and the serial port.
:say
call :log %*
(>%PORT% echo hyper2kvm: %*) 2>nul
exit /b 0

:log
>>"%LOG%" echo %DATE% %TIME% hyper2kvm: %*
exit /b 0

rem Logs how the command before it ended.
:ran
set "E=%ERRORLEVEL%"
call :log %*: rc=%E%
if not "%E%"=="0" set "BAD=%E%"
exit /b 0

:driver
if defined STUCK exit /b 0
set "DEV="
set "DRV="
set "VER="
if not "%2"=="" for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Services\%2\Enum" /v 0 2^>nul') do if "%%b"=="REG_SZ" set "DEV=%%c"
if defined DEV set "DEV=%DEV:"=%"
if defined DEV for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Enum\%DEV%" /v Driver 2^>nul') do if "%%b"=="REG_SZ" set "DRV=%%c"
if defined DRV set "DRV=%DRV:"=%"
if defined DRV for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Control\Class\%DRV%" /v DriverVersion 2^>nul') do if "%%b"=="REG_SZ" set "VER=%%c"
if defined VER set "VER=%VER:"=%"
if "%VER%"=="%3" if not "%3"=="" call :log %1: version %3 is in use already
if "%VER%"=="%3" if not "%3"=="" exit /b 0
call :watched add-driver %1
exit /b 0

rem Runs part of this script as a process of its own: an installer that asks somebody who is not there
rem must not hold up everything else.
:watched
del /q "%DIR%rc" "%DIR%install.log" >nul 2>&1
start "" /b %SYS%\cmd.exe /d /c ""%~f0" %1 %2" >nul 2>&1
set "WAIT=0"
:watch
if exist "%DIR%rc" goto watch_end
set /a WAIT+=1
if %WAIT% gtr 300 goto watch_stuck
%SYS%\ping.exe -n 2 127.0.0.1 >nul 2>&1
goto watch
:watch_stuck
call :log %1 %2: no end after five minutes
set "STUCK=1"
set "BAD=258"
%SYS%\taskkill.exe /f /im pnputil.exe >nul 2>&1
exit /b 0
:watch_end
set "E=1"
set /p E=<"%DIR%rc"
type "%DIR%install.log" >>"%LOG%" 2>nul
call :log %1 %2: rc=%E%
rem No device for it, or a newer driver is there; a restart is wanted.
if "%E%"=="259" exit /b 0
if "%E%"=="3010" exit /b 0
if "%E%"=="1641" exit /b 0
if not "%E%"=="0" set "BAD=%E%"
exit /b 0

:installed
set "E=%ERRORLEVEL%"
>"%DIR%rc.tmp" echo %E%
move /y "%DIR%rc.tmp" "%DIR%rc" >nul
exit %E%

rem The value NAME of KEY as it was before.
:restore
set "OLD="
for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Services\%SVC%\Parameters" /v %NAME% 2^>nul') do if "%%b"=="REG_DWORD" set "OLD=%%c"
if not defined OLD exit /b 0
if /i "%OLD%"=="0xffffffff" %SYS%\reg.exe delete "%CCS%\%KEY%" /v %NAME% /f >>"%LOG%" 2>&1
if /i not "%OLD%"=="0xffffffff" %SYS%\reg.exe add "%CCS%\%KEY%" /v %NAME% /t REG_DWORD /d %OLD% /f >>"%LOG%" 2>&1
call :ran restore %NAME%
exit /b 0

rem The connection NIC: the one adapter of @NIC@ that is there (WANT=ONLY), or that with the MAC WANT.
:find_nic
set "NIC="
set "COUNT=0"
for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Services\@NIC@\Enum" /v Count 2^>nul') do if "%%b"=="REG_DWORD" set /a COUNT=%%c
if "%WANT%"=="ONLY" if not "%COUNT%"=="1" exit /b 11
set "I=0"
:next_nic
if %I% geq %COUNT% exit /b 12
set "DEV="
set "DRV="
set "GUID="
for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Services\@NIC@\Enum" /v %I% 2^>nul') do if "%%b"=="REG_SZ" set "DEV=%%c"
if defined DEV set "DEV=%DEV:"=%"
if defined DEV for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Enum\%DEV%" /v Driver 2^>nul') do if "%%b"=="REG_SZ" set "DRV=%%c"
if defined DRV set "DRV=%DRV:"=%"
if defined DRV for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Control\Class\%DRV%" /v NetCfgInstanceId 2^>nul') do if "%%b"=="REG_SZ" set "GUID=%%c"
if defined GUID set "GUID=%GUID:"=%"
set /a I+=1
if not defined GUID goto next_nic
if "%WANT%"=="ONLY" goto name_nic
set "MAC="
for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Control\NetworkSetup2\Interfaces\%GUID%\Kernel" /v PermanentAddress 2^>nul') do if "%%b"=="REG_BINARY" set "MAC=%%c"
rem Windows 7 and 8 do not keep it there.
if not defined MAC for /f "tokens=1,2 delims=," %%a in ('%SYS%\getmac.exe /fo csv /nh 2^>nul') do if /i "%%~b"=="\Device\Tcpip_%GUID%" set "MAC=%%~a"
if not defined MAC goto next_nic
set "MAC=%MAC:-=%"
if /i not "%MAC%"=="%WANT%" goto next_nic
:name_nic
for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Control\Network\{4D36E972-E325-11CE-BFC1-08002BE10318}\%GUID%\Connection" /v Name 2^>nul') do if "%%b"=="REG_SZ" set "NIC=%%c"
if defined NIC set "NIC=%NIC:"=%"
if not defined NIC goto next_nic
exit /b 0
"#;

/// Removes the old adapter with its settings, but not the network profiles. They have the
/// firewall's rules, and depend on the gateway's MAC address, which stays.
pub(super) const GHOST_ROUTINES: &str = r#"
rem Takes away the device OLD_DEV with the adapter OLD_GUID, unless a driver has it, and gives its name
rem to the connection of WANT.
:ghost
set "OLD_SVC="
set "OLD_NAME="
set "KEPT="
for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Enum\%OLD_DEV%" /v Service 2^>nul') do if "%%b"=="REG_SZ" set "OLD_SVC=%%c"
if defined OLD_SVC set "OLD_SVC=%OLD_SVC:"=%"
if defined OLD_SVC for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Services\%OLD_SVC%\Enum" 2^>nul') do if /i "%%c"=="%OLD_DEV%" set "KEPT=1"
if defined KEPT call :log the adapter %OLD_GUID% is still there and stays
if defined KEPT exit /b 0
for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query "%CCS%\Control\Network\{4D36E972-E325-11CE-BFC1-08002BE10318}\%OLD_GUID%\Connection" /v Name 2^>nul') do if "%%b"=="REG_SZ" set "OLD_NAME=%%c"
if defined OLD_NAME set "OLD_NAME=%OLD_NAME:"=%"
%SYS%\reg.exe query "%CCS%\Enum\%OLD_DEV%" >nul 2>&1
if errorlevel 1 goto ghost_records
if "%~1"=="pnputil" %SYS%\pnputil.exe /remove-device "%OLD_DEV%" >>"%LOG%" 2>&1
if "%~1"=="registry" %SYS%\reg.exe delete "%CCS%\Enum\%OLD_DEV%" /f >>"%LOG%" 2>&1
call :ran remove the old adapter %OLD_GUID%
if not "%BAD%"=="0" exit /b %BAD%
:ghost_records
for %%k in ("Control\Network\{4D36E972-E325-11CE-BFC1-08002BE10318}\%OLD_GUID%" "Services\Tcpip\Parameters\Interfaces\%OLD_GUID%" "Services\Tcpip6\Parameters\Interfaces\%OLD_GUID%" "Services\NetBT\Parameters\Interfaces\Tcpip_%OLD_GUID%") do %SYS%\reg.exe delete "%CCS%\%%~k" /f >nul 2>&1
if not defined WANT exit /b 0
if not defined OLD_NAME exit /b 0
call :find_nic
if errorlevel 1 exit /b 0
if "%NIC%"=="%OLD_NAME%" exit /b 0
%SYS%\netsh.exe interface set interface name="%NIC%" newname="%OLD_NAME%" >>"%LOG%" 2>&1
call :ran the name of the old adapter for the new one
exit /b 0
"#;

/// Assigns drive letters with `mountvol`. Windows remembers letters, but a CD-ROM that appeared
/// first may have taken one.
pub(super) const DISK_ROUTINES: &str = r#"
rem The disk number N.
:online
>"%DIR%disk.txt" echo select disk %N%
>>"%DIR%disk.txt" echo online disk noerr
if not "%~1"=="keep" >>"%DIR%disk.txt" echo attributes disk clear readonly noerr
%SYS%\diskpart.exe /s "%DIR%disk.txt" >>"%LOG%" 2>&1
call :ran disk %N% online
exit /b 0

rem The letter %1 for the volume %2, unless it has it; a CD-ROM has to give it up.
:letter
set "WAIT=0"
:letter_wait
set "HAS="
for /f "tokens=1" %%a in ('%SYS%\mountvol.exe %1: /L 2^>nul') do set "HAS=%%a"
if not "%HAS:~0,10%"=="\\?\Volume" set "HAS="
if /i "%HAS%"=="\\?\Volume%2\" exit /b 0
set /a WAIT+=1
if defined HAS goto letter_other
if %WAIT% geq 5 goto letter_set
%SYS%\ping.exe -n 2 127.0.0.1 >nul 2>&1
goto letter_wait
:letter_other
set "DATA="
for /f "tokens=1,2,*" %%a in ('%SYS%\reg.exe query HKLM\SYSTEM\MountedDevices /v "\DosDevices\%1:" 2^>nul') do if "%%b"=="REG_BINARY" set "DATA=%%c"
if not defined DATA goto letter_taken
rem "CdRom"
if "%DATA:4300640052006F006D00=%"=="%DATA%" goto letter_taken
%SYS%\mountvol.exe %1: /D >>"%LOG%" 2>&1
call :log letter %1 was with a CD-ROM
:letter_set
%SYS%\mountvol.exe %1: \\?\Volume%2\ >>"%LOG%" 2>&1
call :ran letter %1
exit /b 0
:letter_taken
call :log letter %1 belongs to another volume now
set "BAD=183"
exit /b 0
"#;
