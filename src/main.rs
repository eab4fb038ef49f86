use std::process::ExitCode;

use hyper2kvm::{cli, guest, registry, tool, wire};

fn main() -> ExitCode {
    if !cli::can_start() {
        return ExitCode::from(hyper2kvm::error::ErrorKind::MissingTool.code());
    }
    if let Some(code) = tool::launcher::run_if_asked(std::env::args_os()) {
        return code;
    }
    if let Some(code) = guest::confined::run_if_asked(std::env::args_os()) {
        return code;
    }
    if let Some(code) = wire::run_if_asked(std::env::args_os()) {
        return code;
    }
    if let Some(code) = registry::confined::run_if_asked(std::env::args_os()) {
        return code;
    }
    tool::launcher::enable();
    cli::main()
}
