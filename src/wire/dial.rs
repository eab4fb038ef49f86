//! Selects the transport for a server, and implements the short diallers: NBD and commands.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::Access;
use super::Ranges;
use super::control::{Order, Password};
use super::dirty;
use super::error::{Result, WireError};
use super::https::HttpsDial;
use super::nbd::{Names, Nbd, Stream};
use super::ssh::{Program, Prompter, SshDial};
use super::tls::Trust;
use super::upstream::{Connection, Dial, Meter, STALL};
use super::url::{Location, Server};
use crate::tool::Cmd;

/// The dialler of an order. It reads the named files, before they are out of reach.
pub(super) fn of_order(order: &Order, meter: &Arc<Meter>) -> Result<Box<dyn Dial>> {
    let (server, access) = (order.server.clone(), &order.access);
    check(&server, access, order.password.as_ref())?;
    let meter = meter.clone();
    Ok(match &server {
        Server::Ssh { .. } => {
            let prompter = match &order.password {
                Some(password) => Some(prompter(&order.socket, password, &server)?),
                None => None,
            };
            Box::new(SshDial::new(server, access.clone(), prompter, meter))
        }
        Server::Https { .. } => {
            let password = order.password.as_ref();
            Box::new(HttpsDial::new(server, access, password, meter)?)
        }
        Server::Nbd { tls, .. } => {
            let trust = match tls {
                true => Some(Trust::new(access)?),
                false => None,
            };
            let config = trust.as_ref().map(Trust::config).transpose()?;
            let tls = trust.zip(config);
            Box::new(NbdDial { server, tls, meter })
        }
        Server::NbdUnix { .. } => Box::new(NbdDial {
            server,
            tls: None,
            meter,
        }),
        Server::Command => {
            let command = access.source_command.as_deref().unwrap_or_default();
            let words = words(command)?;
            Box::new(CommandDial { words, meter })
        }
    })
}

/// Refuses options that have no meaning for this server: an unused password was certainly meant for
/// something.
fn check(server: &Server, access: &Access, password: Option<&Password>) -> Result<()> {
    let refuse = |option: &str, of: &str| {
        Err(WireError::usage(
            format!("{option} is for {of}, and this is {server}"),
            "leave it out",
        ))
    };
    let tls = matches!(server, Server::Https { .. } | Server::Nbd { tls: true, .. });
    let users = matches!(server, Server::Https { .. } | Server::Ssh { .. });
    if password.is_some() && !users {
        return refuse("--password-file", "ssh and https");
    }
    if access.tls_fingerprint.is_some() && !matches!(server, Server::Https { .. }) && !tls {
        return refuse("--tls-fingerprint", "https");
    }
    Ok(())
}

fn prompter(socket: &Path, password: &Password, server: &Server) -> Result<Prompter> {
    let socket = socket.with_extension("ask");
    let started = Prompter::start(socket, password.clone());
    started.map_err(|e| WireError::failed(server, format!("preparing the password: {e}"), ""))
}

/// Splits a command by POSIX quoting, without a shell and without expansion.
pub(super) fn words(command: &str) -> Result<Vec<String>> {
    let words = shell_words::split(command)
        .map_err(|e| WireError::usage(format!("--source-command: {e}"), "close the quotes"))?;
    match words.is_empty() {
        true => Err(WireError::usage(
            "--source-command names no program",
            "'PROGRAM ARG...', e.g. 'nbdkit -s file disk.img'",
        )),
        false => Ok(words),
    }
}

struct NbdDial {
    server: Server,
    tls: Option<(Arc<Trust>, Arc<ClientConfig>)>,
    meter: Arc<Meter>,
}

type Start = dyn Fn(&Location) -> Result<Nbd> + Send;

/// A connection to one export: the path of the file is the export's name.
struct NbdConnection {
    dial: Box<Start>,
    open: Option<(Location, Nbd)>,
}

impl NbdConnection {
    fn to(&mut self, at: &Location) -> Result<&mut Nbd> {
        if self.open.as_ref().is_some_and(|(open, _)| open != at) {
            self.open = None;
        }
        let (_, nbd) = match self.open.take() {
            Some(open) => self.open.insert(open),
            None => self.open.insert((at.clone(), (self.dial)(at)?)),
        };
        Ok(nbd)
    }
}

impl Connection for NbdConnection {
    fn identify(&mut self, at: &Location) -> Result<super::Identity> {
        // The size is in the greeting, so a new connection is needed.
        self.open = None;
        self.to(at)?.identify(at)
    }

    fn depth(&self) -> usize {
        self.open.as_ref().map_or(1, |(_, nbd)| nbd.depth())
    }

    fn is_ready(&self, wanted: &super::upstream::Wanted) -> bool {
        let open = self.open.as_ref();
        open.is_some_and(|(open, _)| *open == wanted.target.at)
    }

    fn send(&mut self, token: u64, wanted: &super::upstream::Wanted) -> Result<()> {
        self.to(&wanted.target.at)?.send(token, wanted)
    }

    fn receive(&mut self) -> Result<(u64, Result<Vec<u8>>)> {
        match &mut self.open {
            Some((_, nbd)) => nbd.receive(),
            None => Err(WireError::failed("NBD", "nothing was asked for", "")),
        }
    }
}

impl Dial for NbdDial {
    fn dirty(&self, at: &Location) -> Result<Option<Ranges>> {
        let names = Names {
            server: self.server.to_string(),
            export: at.path().to_owned(),
        };
        let (mut stream, flags) = connect(&self.server, self.tls.as_ref(), &names)?;
        dirty::ranges(&mut *stream, flags, &names)
    }

    fn dial(&self) -> Result<Box<dyn Connection>> {
        let (server, tls, meter) = (self.server.clone(), self.tls.clone(), self.meter.clone());
        let dial = move |at: &Location| {
            let names = Names {
                server: server.to_string(),
                export: at.path().to_owned(),
            };
            let (stream, flags) = connect(&server, tls.as_ref(), &names)?;
            Nbd::start(stream, flags, names, meter.clone(), Box::new(|| None))
        };
        Ok(Box::new(NbdConnection {
            dial: Box::new(dial),
            open: None,
        }))
    }
}

fn connect(
    server: &Server,
    tls: Option<&(Arc<Trust>, Arc<ClientConfig>)>,
    names: &Names,
) -> Result<(Box<dyn Stream>, u16)> {
    match server {
        Server::NbdUnix { socket } => {
            let stream = UnixStream::connect(socket).map_err(|e| names.failed(e))?;
            let timeout = stream.set_read_timeout(Some(STALL));
            timeout
                .and_then(|()| stream.set_write_timeout(Some(STALL)))
                .map_err(|e| names.failed(e))?;
            let mut stream: Box<dyn Stream> = Box::new(stream);
            let flags = names.greet(&mut *stream)?;
            Ok((stream, flags))
        }
        Server::Nbd { host, port, .. } => {
            let mut stream = tcp(host, *port).map_err(|e| names.failed(e))?;
            let flags = names.greet(&mut stream)?;
            let Some((trust, config)) = tls else {
                return Ok((Box::new(stream), flags));
            };
            names.start_tls(&mut stream)?;
            let secured = secured(stream, host, config);
            let stream = secured.map_err(|e| trust.refusal(server).unwrap_or(names.failed(e)))?;
            Ok((Box::new(stream), flags))
        }
        _ => Err(names.failed("not an NBD server")),
    }
}

fn secured(
    mut stream: TcpStream,
    host: &str,
    config: &Arc<ClientConfig>,
) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let connection = ClientConnection::new(config.clone(), name);
    let mut connection = connection.map_err(io::Error::other)?;
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    Ok(StreamOwned::new(connection, stream))
}

fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::other("there is no host of that name");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, STALL) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(STALL))?;
                stream.set_write_timeout(Some(STALL))?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Starts for each connection a program that speaks NBD on its stdin and stdout.
struct CommandDial {
    words: Vec<String>,
    meter: Arc<Meter>,
}

impl CommandDial {
    /// The program, its stream, and its name in messages.
    fn start(&self) -> Result<(Program, UnixStream, String)> {
        let Some((name, args)) = self.words.split_first() else {
            return Err(WireError::usage("--source-command names no program", ""));
        };
        let program = Program::start(Cmd::new(name).args(args), &Server::Command)?;
        let stream = program.stream.try_clone();
        let stream = stream.map_err(|e| WireError::failed(name, e, ""))?;
        Ok((program, stream, format!("the source command {name}")))
    }
}

impl Dial for CommandDial {
    fn dirty(&self, _at: &Location) -> Result<Option<Ranges>> {
        let (_program, mut stream, server) = self.start()?;
        let names = Names {
            server,
            export: String::new(),
        };
        let flags = names.greet(&mut stream)?;
        dirty::ranges(&mut stream, flags, &names)
    }

    fn dial(&self) -> Result<Box<dyn Connection>> {
        let (program, stream, shown) = self.start()?;
        let same = stream.try_clone();
        let mut stream: Box<dyn Stream> = Box::new(stream);
        let program = Mutex::new(program);
        let named = shown.clone();
        let why = move || {
            let mut program = program.lock().unwrap_or_else(PoisonError::into_inner);
            let said = program.ended()?;
            let last = said.lines().rev().find(|line| !line.trim().is_empty());
            Some(WireError::failed(
                &named,
                format!("it ended: {}", last.unwrap_or(&said)),
                "run it by hand to see its messages; it must speak NBD on stdin and stdout",
            ))
        };
        let names = Names {
            server: shown,
            export: String::new(),
        };
        let flags = names.greet(&mut *stream);
        let flags = flags.map_err(|error| why().unwrap_or(error))?;
        let nbd = Nbd::start(stream, flags, names, self.meter.clone(), Box::new(why))?;
        let patient = same.and_then(|stream| stream.set_read_timeout(Some(STALL)));
        patient.map_err(|e| WireError::failed("the source command", e, ""))?;
        Ok(Box::new(nbd))
    }
}
