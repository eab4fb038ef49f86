//! The child's side: receives its order, gives up unneeded rights, connects and serves.
//!
//! One conversation with the parent, one thread for each client of the NBD server, one for each
//! connection to the other side. The child ends when the parent closes the conversation, and with
//! the parent.

use std::ffi::OsString;
use std::fs::Permissions;
use std::io::{self, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use super::control::{self, Answer, Order, Request};
use super::error::{Result, WireError};
use super::pool::Pool;
use super::service::{Service, cache_file};
use super::upstream::Meter;
use super::url::Server;
use super::{VERB, dial, server, ssh};
use crate::failpoint;
use crate::tool::confine::{self, Dials};
use crate::tool::launcher;

/// The failpoint at every request except the first.
const FAILPOINT: &str = "wire-child";

/// Runs the child if this process was started as one, or by `ssh` to provide a password. Called in
/// `main` with all arguments.
pub fn run_if_asked(args: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.get(1).is_none_or(|verb| verb != VERB) {
        return match args.len() {
            2 => ssh::ask_if_asked(args),
            _ => None,
        };
    }
    Some(match run(args.into_iter().nth(2)) {
        Ok(()) => ExitCode::SUCCESS,
        // The error was sent over the socket, if there was one.
        Err(_) => ExitCode::FAILURE,
    })
}

fn run(parent: Option<OsString>) -> io::Result<()> {
    launcher::tie_to(parent)?;
    // It starts `ssh` or the source command, which have to end with it.
    launcher::enable();
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    converse(UnixStream::from(socket), Confined::Yes)
}

/// Whether this is a separate process, which gives up unneeded rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Confined {
    Yes,
    No,
}

/// Answers the parent until it disconnects.
pub(super) fn converse(stream: UnixStream, confined: Confined) -> io::Result<()> {
    let mut output = stream.try_clone()?;
    let mut input = BufReader::new(stream);
    let mut service: Option<Arc<Service>> = None;
    loop {
        let request = match control::receive(&mut input) {
            Ok(request) => request,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        };
        let answer = match (request, &service) {
            (Request::Start(order), None) => start(&order, confined).map(|started| {
                service = Some(started);
                (Answer::Done, Vec::new())
            }),
            (request, Some(service)) => carry_out(request, service),
            _ => Err(WireError::usage("not started", "")),
        };
        let (answer, bytes) = answer.unwrap_or_else(|e| (Answer::Failed(e), Vec::new()));
        control::send(&mut output, &answer)?;
        output.write_all(&bytes)?;
    }
}

fn start(order: &Order, confined: Confined) -> Result<Arc<Service>> {
    let failed = |doing: &str, e: io::Error| WireError::host(&order.server, doing, &e, "");
    let cache = cache_file().map_err(|e| failed("making a cache", e))?;
    let listener = UnixListener::bind(&order.socket)
        .and_then(|listener| {
            std::fs::set_permissions(&order.socket, Permissions::from_mode(0o600))?;
            Ok(listener)
        })
        .map_err(|e| failed("listening on a socket", e))?;
    let meter = Arc::new(Meter::default());
    let dial = dial::of_order(order, &meter)?;
    if confined == Confined::Yes {
        confine::dials(&reach(&order.server))
            .map_err(|e| failed("giving up what is not needed", e))?;
    }
    let access = &order.access;
    let pool = Pool::new(
        dial,
        meter.clone(),
        access.connections(&order.server),
        access.retries,
        access.patience.max(Duration::from_secs(1)),
    );
    let pool = pool.map_err(|e| failed("starting threads", e))?;
    let service = Arc::new(Service::new(pool, meter, cache));
    service.connect()?;
    let served = service.clone();
    std::thread::Builder::new()
        .name("nbd-server".into())
        .spawn(move || server::serve(&listener, &served))
        .map_err(|e| failed("starting a thread", e))?;
    Ok(service)
}

/// The access that the child keeps for that server.
fn reach(server: &Server) -> Dials {
    match server {
        Server::Https { port, .. } | Server::Nbd { port, .. } => Dials::Tcp(*port),
        Server::NbdUnix { socket } => Dials::Unix(socket.clone()),
        Server::Ssh { .. } | Server::Command => Dials::Programs,
    }
}

fn carry_out(request: Request, service: &Service) -> Result<(Answer, Vec<u8>)> {
    failpoint::hit(FAILPOINT).map_err(|e| WireError::failed("the child that dials", e, ""))?;
    let answer = match request {
        Request::Start(_) => return Err(WireError::usage("started already", "")),
        Request::Open(at) => Answer::Identity(service.open(&at)?.target.identity.clone()),
        Request::Identify(at) => Answer::Identity(service.identify(&at)?),
        Request::Dirty(at) => Answer::Dirty(service.dirty(&at)?),
        Request::List(at) => Answer::Listed(service.list(&at)?),
        Request::ReadWhole { at, most } => {
            let bytes = service.read_whole(&at, most)?;
            return Ok((Answer::Bytes(bytes.len() as u64), bytes));
        }
        Request::Prepare(at) => {
            service.prepare(&at)?;
            Answer::Done
        }
        Request::Expect { at, ranges } => {
            service.expect(&at, ranges)?;
            Answer::Done
        }
        Request::Status => Answer::Status(service.meter().status()),
    };
    Ok((answer, Vec::new()))
}
