//! Ranges of files over HTTPS: from a plain web server, an ESXi host, or the `/folder` of a
//! vCenter.
//!
//! `ureq` implements HTTP; TLS is set up here, because certificates can be pinned ([`super::tls`]).
//! A file is read by GET with `Range`, without a HEAD before (ESXi announces nothing, and answers
//! 206). Only a 206 with exactly the requested range and length is accepted. After a 503 the
//! request is repeated, after a 401 once in a new session. Redirects stay on the host, and any sign
//! that the file changed ends the run.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use ureq::http::{HeaderMap, StatusCode};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, Either, LazyBuffers, NextTimeout, TcpConnector,
    Transport, TransportAdapter,
};
use ureq::{Agent, Body, Error};
use zeroize::Zeroizing;

use super::control::Password;
use super::error::{Result, WireError};
use super::tls::Trust;
use super::upstream::{Connection, Dial, Meter, PIECE, RemoteFile, STALL, Wanted};
use super::url::{Location, Server};
use super::{Access, Identity, Listed};

const MAX_REDIRECTS: usize = 5;
/// The number of waits for a busy server in one request, and the longest duration of each.
const MAX_WAITS: usize = 10;
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// The number of renewals of expired sessions in one request.
const MAX_RENEWALS: usize = 5;
const MAX_COOKIES: usize = 16;
const MAX_COOKIE: usize = 4096;
/// The size limit of a page with a listing.
const MAX_PAGE: u64 = 4 << 20;
/// The number of bytes read from the connection at a time.
const INPUT: usize = 128 << 10;

/// Cookies, which identify a session: one for all connections, because hosts limit their number.
#[derive(Debug, Default)]
struct Session {
    cookies: Vec<(String, String)>,
    /// Counts renewals, so that several connections that find it expired renew it once.
    age: u64,
}

/// The session of a request.
struct Used {
    age: u64,
    /// Whether there was one: without one, the password itself is refused.
    any: bool,
}

impl Used {
    /// The number of refusals in such a session after which a request is given up.
    fn renewals(&self) -> usize {
        if self.any { MAX_RENEWALS } else { 1 }
    }
}

pub(super) struct HttpsDial {
    server: Server,
    trust: Arc<Trust>,
    config: Arc<ClientConfig>,
    authorization: Option<Arc<Zeroizing<String>>>,
    session: Arc<Mutex<Session>>,
    meter: Arc<Meter>,
}

impl HttpsDial {
    pub(super) fn new(
        server: Server,
        access: &Access,
        password: Option<&Password>,
        meter: Arc<Meter>,
    ) -> Result<Self> {
        let trust = Trust::new(access)?;
        let user = match &server {
            Server::Https { user, .. } => access.user.as_ref().or(user.as_ref()),
            _ => None,
        };
        let authorization = match (user, password) {
            (Some(user), Some(password)) => {
                if user.contains(':') {
                    return Err(WireError::usage("a user's name has no colon in HTTP", ""));
                }
                let both = Zeroizing::new(format!("{user}:{}", password.text()));
                let coded = base64::engine::general_purpose::STANDARD.encode(both.as_bytes());
                Some(Arc::new(Zeroizing::new(format!("Basic {coded}"))))
            }
            (None, Some(_)) => {
                return Err(WireError::usage(
                    "a password for https, but no user",
                    "name the user with --user",
                ));
            }
            (_, None) => None,
        };
        Ok(Self {
            config: trust.config()?,
            server,
            trust,
            authorization,
            session: Arc::default(),
            meter,
        })
    }
}

impl Dial for HttpsDial {
    fn may_prepare(&self) -> bool {
        true
    }

    fn piece(&self) -> u64 {
        8 * PIECE
    }

    /// One and a half pieces for each connection. No program beside this one takes memory.
    fn ahead(&self) -> u64 {
        96 << 20
    }

    fn dial(&self) -> Result<Box<dyn Connection>> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .https_only(true)
            .max_redirects(0)
            .proxy(None)
            .user_agent(concat!("hyper2kvm/", env!("CARGO_PKG_VERSION")))
            .accept("*/*")
            .accept_encoding("identity")
            .timeout_resolve(Some(STALL))
            .timeout_connect(Some(STALL))
            .timeout_send_request(Some(STALL))
            .timeout_recv_response(Some(STALL))
            .timeout_per_read(Some(STALL))
            .timeout_per_write(Some(STALL))
            .input_buffer_size(INPUT)
            .max_idle_connections(1)
            .max_idle_connections_per_host(1)
            .max_idle_age(Duration::from_secs(30))
            .build();
        let connector = ().chain(TcpConnector::default()).chain(Tls(self.config.clone()));
        Ok(Box::new(Https {
            agent: Agent::with_parts(config, connector, DefaultResolver::default()),
            server: self.server.clone(),
            trust: self.trust.clone(),
            authorization: self.authorization.clone(),
            session: self.session.clone(),
            meter: self.meter.clone(),
            asked: None,
        }))
    }
}

struct Https {
    agent: Agent,
    server: Server,
    trust: Arc<Trust>,
    authorization: Option<Arc<Zeroizing<String>>>,
    session: Arc<Mutex<Session>>,
    meter: Arc<Meter>,
    asked: Option<(u64, Wanted)>,
}

type Response = ureq::http::Response<Body>;

impl Https {
    fn session(&self) -> std::sync::MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The final answer to a GET, after handling sessions, redirects and retries.
    fn get(&self, at: &Location, range: Option<(u64, u64)>) -> Result<Response> {
        let mut target = at.target();
        let (mut redirects, mut waits, mut renewals) = (0, 0, 0);
        loop {
            let (answer, used) = self.get_once(at, &target, range)?;
            let status = answer.status();
            match status {
                // A session renewed by another connection may have expired again.
                StatusCode::UNAUTHORIZED if renewals < used.renewals() => {
                    renewals += 1;
                    let mut session = self.session();
                    if session.age == used.age {
                        session.cookies.clear();
                        session.age += 1;
                    }
                }
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                    waits += 1;
                    let busy = || {
                        WireError::failed(
                            at,
                            format!("the server is busy (HTTP {})", status.as_u16()),
                            "ESXi and vCenter limit sessions: close others, or give fewer --connections",
                        )
                    };
                    self.meter.note(&busy());
                    if waits > MAX_WAITS {
                        return Err(busy());
                    }
                    std::thread::sleep(retry_after(answer.headers()));
                }
                status if status.is_redirection() => {
                    redirects += 1;
                    let to = header(answer.headers(), "location").unwrap_or_default();
                    target = self.followed(at, &target, to)?;
                    if redirects > MAX_REDIRECTS {
                        return Err(denied(
                            at,
                            "the server redirects without an end",
                            "see what serves this URL: look into the server's log",
                        ));
                    }
                }
                _ => {
                    if waits > 0 {
                        self.meter.settled();
                    }
                    return Ok(answer);
                }
            }
        }
    }

    fn get_once(
        &self,
        at: &Location,
        target: &str,
        range: Option<(u64, u64)>,
    ) -> Result<(Response, Used)> {
        let Server::Https { host, port, .. } = &self.server else {
            return Err(WireError::usage("not a server of https", ""));
        };
        let host = match host.contains(':') {
            true => format!("[{host}]"),
            false => host.clone(),
        };
        let mut request = self.agent.get(format!("https://{host}:{port}{target}"));
        if let Some((first, last)) = range {
            request = request.header("Range", format!("bytes={first}-{last}"));
        }
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization.as_str());
        }
        let used = {
            let session = self.session();
            if !session.cookies.is_empty() {
                let pairs: Vec<_> = session
                    .cookies
                    .iter()
                    .map(|(n, v)| format!("{n}={v}"))
                    .collect();
                request = request.header("Cookie", pairs.join("; "));
            }
            Used {
                age: session.age,
                any: !session.cookies.is_empty(),
            }
        };
        let answer = request.call().map_err(|error| self.explain(at, error))?;
        self.session().keep(answer.headers());
        Ok((answer, used))
    }

    fn explain(&self, at: &Location, error: Error) -> WireError {
        if let Some(refusal) = self.trust.refusal(&self.server) {
            return refusal;
        }
        let reason = match &error {
            Error::Timeout(what) => format!("the server does not answer ({what})"),
            Error::HostNotFound => {
                return denied(
                    at,
                    "there is no host of that name",
                    "check the name of the host",
                );
            }
            Error::Io(error) => broken(error),
            error => error.to_string(),
        };
        WireError::failed(
            at,
            reason,
            "see that the line and the server are up, and start again",
        )
    }

    /// The target of a redirect on this host.
    fn followed(&self, at: &Location, from: &str, to: &str) -> Result<String> {
        let elsewhere = || {
            denied(
                at,
                "the server redirects to another host, or out of HTTPS",
                "name the file by the URL it leads to, when that is right",
            )
        };
        if to.starts_with("//") {
            return Err(elsewhere());
        }
        if to.starts_with('/') {
            return Ok(to.to_owned());
        }
        if !to.contains("://") {
            let folder = from
                .split('?')
                .next()
                .and_then(|path| path.rsplit_once('/'));
            let (folder, _) = folder.filter(|_| !to.is_empty()).ok_or_else(elsewhere)?;
            return Ok(format!("{folder}/{to}"));
        }
        let Ok(Some(next)) = Location::parse(to) else {
            return Err(elsewhere());
        };
        let place = |server: &Server| match server {
            Server::Https { host, port, .. } => Some((host.to_ascii_lowercase(), *port)),
            _ => None,
        };
        match place(&next.server) == place(&self.server) {
            true => Ok(next.target()),
            false => Err(elsewhere()),
        }
    }

    /// The bytes of a range, and the file's identity in this answer.
    fn range(&self, at: &Location, first: u64, length: u64) -> Result<(Vec<u8>, Identity)> {
        let last = first + length - 1;
        let answer = self.get(at, Some((first, last)))?;
        let status = match answer.status() {
            // The whole of an empty file: nginx has no other answer.
            StatusCode::OK if header(answer.headers(), "content-length") == Some("0") => {
                StatusCode::RANGE_NOT_SATISFIABLE
            }
            status => status,
        };
        if status != StatusCode::PARTIAL_CONTENT {
            return Err(refused(at, status, answer.headers()));
        }
        let (headers, body) = answer.into_parts();
        let headers = headers.headers;
        let wrong = |what: String| {
            WireError::failed(
                at,
                format!("the server answers {what}"),
                "see what serves this URL: a proxy in between may be at fault",
            )
        };
        let told = header(&headers, "content-range");
        let Some((from, to, size)) = told.and_then(content_range) else {
            let shown = crate::tool::clean(told.unwrap_or("none").as_bytes());
            return Err(wrong(format!("a range that is not understood ({shown})")));
        };
        // The end of the file may come first.
        if from != first || to > last || size.is_some_and(|size| to >= size) {
            return Err(wrong(format!(
                "bytes {from}-{to} where {first}-{last} were asked for"
            )));
        }
        if let Some(coding) = header(&headers, "content-encoding").filter(|c| *c != "identity") {
            return Err(wrong(format!(
                "packed bytes ({})",
                crate::tool::clean(coding.as_bytes())
            )));
        }
        let length = to - from + 1;
        let announced = header(&headers, "content-length").and_then(|l| l.parse::<u64>().ok());
        if announced.is_some_and(|announced| announced != length) {
            return Err(wrong(format!(
                "another length than that of bytes {from}-{to}"
            )));
        }
        let bytes = self.body(at, body, length)?;
        if bytes.len() as u64 != length {
            let got = bytes.len();
            return Err(wrong(format!("{got} bytes where it announced {length}")));
        }
        let identity = Identity {
            size: size.unwrap_or(u64::MAX),
            modified: modified(&headers),
            etag: header(&headers, "etag").map(|tag| crate::tool::clean(tag.as_bytes())),
        };
        Ok((bytes, identity))
    }

    /// Reads the body; one byte more than `length` if there is more.
    fn body(&self, at: &Location, body: Body, length: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length as usize + 1);
        let mut reader = body
            .into_with_config()
            .limit(u64::MAX)
            .reader()
            .take(length + 1);
        let mut counted = 0;
        loop {
            let read = (&mut reader).take(256 << 10).read_to_end(&mut bytes);
            self.meter.count(bytes.len() - counted);
            counted = bytes.len();
            match read {
                Ok(0) => return Ok(bytes),
                Ok(_) => {}
                Err(error) => {
                    return Err(WireError::failed(
                        at,
                        format!(
                            "after {} of {length} bytes: {}",
                            bytes.len(),
                            broken(&error)
                        ),
                        "see that the line and the server are up, and start again",
                    ));
                }
            }
        }
    }

    fn read(&self, wanted: &Wanted) -> Result<Vec<u8>> {
        let target: &RemoteFile = &wanted.target;
        let mut bytes = Vec::new();
        // A server may return less than was requested, as long as it declares that.
        while bytes.len() < wanted.length {
            let offset = wanted.offset + bytes.len() as u64;
            let left = (wanted.length - bytes.len()) as u64;
            let (part, now) = self
                .range(&target.at, offset, left)
                .map_err(|error| self.changed_instead(target, error))?;
            unchanged(target, &now)?;
            match bytes.is_empty() {
                true => bytes = part,
                false => bytes.extend(part),
            }
        }
        Ok(bytes)
    }

    /// Checks whether the file has been replaced: a 416 or 404 in the middle may have that reason.
    fn changed_instead(&self, target: &RemoteFile, error: WireError) -> WireError {
        match &error {
            WireError::OutOfRange { .. } => match self.range(&target.at, 0, 1) {
                Ok((_, now)) => unchanged(target, &now).err().unwrap_or(error),
                Err(_) => error,
            },
            _ => error,
        }
    }
}

/// The reason why a connection has failed.
fn broken(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the server closed the connection".into(),
        _ => error.to_string(),
    }
}

fn denied(at: &Location, reason: impl Into<String>, hint: impl Into<String>) -> WireError {
    WireError::Denied {
        at: at.to_string(),
        reason: reason.into(),
        hint: hint.into(),
    }
}

/// The error for an unexpected status.
fn refused(at: &Location, status: StatusCode, headers: &HeaderMap) -> WireError {
    let code = status.as_u16();
    match code {
        200 => denied(
            at,
            "the server sends the whole file where a range was asked for",
            "it must serve byte ranges: most web servers do, when no proxy in between stops them",
        ),
        401 => {
            let offered = header(headers, "www-authenticate").unwrap_or_default();
            let basic = offered.to_ascii_lowercase().contains("basic");
            denied(
                at,
                match basic || offered.is_empty() {
                    true => "the server requires another user or password (HTTP 401)",
                    false => "the server requires an unsupported kind of login (HTTP 401)",
                },
                "give --user NAME and --password-file FILE",
            )
        }
        403 => denied(
            at,
            "this user may not read it (HTTP 403)",
            "give --user NAME and --password-file FILE of one who may; ESXi needs Datastore.Browse",
        ),
        404 | 410 => WireError::NotFound { at: at.to_string() },
        // These may be temporary: the server is at fault, or declares that.
        416 => WireError::OutOfRange {
            at: at.to_string(),
            hint: "look into the server's log".into(),
        },
        408 | 425 | 500..=599 => WireError::failed(
            at,
            format!("the server answers HTTP {code}"),
            "look into the server's log",
        ),
        _ => denied(
            at,
            format!("the server answers HTTP {code}"),
            "look into the server's log",
        ),
    }
}

fn unchanged(target: &RemoteFile, now: &Identity) -> Result<()> {
    let was = &target.identity;
    let differs = |a: Option<&dyn ToString>, b: Option<&dyn ToString>| match (a, b) {
        (Some(a), Some(b)) => a.to_string() != b.to_string(),
        _ => false,
    };
    // A size of `*` is unknown.
    let size = now.size != u64::MAX && now.size != was.size;
    let times = differs(
        was.modified.as_ref().map(|t| t as &dyn ToString),
        now.modified.as_ref().map(|t| t as &dyn ToString),
    );
    let tags = differs(
        was.etag.as_ref().map(|t| t as &dyn ToString),
        now.etag.as_ref().map(|t| t as &dyn ToString),
    );
    if !(size || times || tags) {
        return Ok(());
    }
    Err(WireError::Changed {
        at: target.at.to_string(),
        was: was.to_string(),
        now: now.to_string(),
    })
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Parses `bytes FIRST-LAST/SIZE`, where the size may be `*`.
fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let rest = text.trim().strip_prefix("bytes")?.trim_start();
    let (range, size) = rest.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let size = match size.trim() {
        "*" => None,
        size => Some(size.parse().ok()?),
    };
    (first <= last).then_some((first, last, size))
}

fn modified(headers: &HeaderMap) -> Option<u64> {
    let time = httpdate::parse_http_date(header(headers, "last-modified")?).ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

/// Parses seconds, or a time; a second if the header is missing.
fn retry_after(headers: &HeaderMap) -> Duration {
    let told = header(headers, "retry-after").unwrap_or_default().trim();
    let wait = match told.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => match httpdate::parse_http_date(told) {
            Ok(time) => time.duration_since(SystemTime::now()).unwrap_or_default(),
            Err(_) => Duration::from_secs(1),
        },
    };
    wait.clamp(Duration::from_millis(100), LONGEST_WAIT)
}

impl Session {
    fn keep(&mut self, headers: &HeaderMap) {
        for set in headers.get_all("set-cookie") {
            let Some(pair) = set.to_str().ok().and_then(|set| set.split(';').next()) else {
                continue;
            };
            let Some((name, value)) = pair.trim().split_once('=') else {
                continue;
            };
            if pair.len() > MAX_COOKIE {
                continue;
            }
            self.cookies.retain(|(known, _)| known != name);
            if self.cookies.len() < MAX_COOKIES {
                self.cookies.push((name.to_owned(), value.to_owned()));
            }
        }
    }
}

impl Connection for Https {
    fn identify(&mut self, at: &Location) -> Result<Identity> {
        match self.range(at, 0, 1) {
            Ok((_, identity)) if identity.size != u64::MAX => Ok(identity),
            Ok(_) => Err(denied(
                at,
                "the server does not provide the size of the file",
                "see what serves this URL: a proxy in between may be at fault",
            )),
            // An empty file has no first byte.
            Err(WireError::OutOfRange { .. }) => Ok(Identity {
                size: 0,
                modified: None,
                etag: None,
            }),
            Err(error) => Err(error),
        }
    }

    fn list(&mut self, directory: &Location) -> Result<Vec<Listed>> {
        let at = match directory.path().ends_with('/') {
            true => directory.clone(),
            false => directory.with_path(&format!("{}/", directory.path())),
        };
        let answer = self.get(&at, None)?;
        let status = answer.status();
        let kind = header(answer.headers(), "content-type").unwrap_or_default();
        if status != StatusCode::OK || !kind.starts_with("text/html") {
            return Err(match status.as_u16() {
                401 | 404 => refused(&at, status, answer.headers()),
                code => WireError::CannotList {
                    at: directory.to_string(),
                    reason: format!("the server gives no listing of it (HTTP {code})"),
                },
            });
        }
        let page = self.body(&at, answer.into_body(), MAX_PAGE)?;
        Ok(super::listing::entries(
            &String::from_utf8_lossy(&page),
            &at,
        ))
    }

    fn depth(&self) -> usize {
        1
    }

    /// A new connection needs three round trips before its first answer.
    fn prepare(&mut self, target: &Arc<RemoteFile>) -> Result<()> {
        if target.identity.size == 0 {
            return Ok(());
        }
        let (_, now) = self.range(&target.at, 0, 1)?;
        unchanged(target, &now)
    }

    fn send(&mut self, token: u64, wanted: &Wanted) -> Result<()> {
        self.asked = Some((token, wanted.clone()));
        Ok(())
    }

    fn receive(&mut self) -> Result<(u64, Result<Vec<u8>>)> {
        match self.asked.take() {
            Some((token, wanted)) => Ok((token, self.read(&wanted))),
            None => Err(WireError::failed(&self.server, "nothing was asked for", "")),
        }
    }
}

/// TLS over any lower transport, with hyper2kvm's own verification.
#[derive(Debug)]
struct Tls(Arc<ClientConfig>);

impl<In: Transport> Connector<In> for Tls {
    type Out = Either<In, TlsTransport>;

    fn connect(
        &self,
        details: &ConnectionDetails,
        chained: Option<In>,
    ) -> std::result::Result<Option<Self::Out>, Error> {
        let Some(transport) = chained else {
            return Ok(None);
        };
        let bad = |e: &dyn std::fmt::Display| Error::Io(io::Error::other(e.to_string()));
        let host = details.uri.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|e| bad(&e))?;
        let mut connection = ClientConnection::new(self.0.clone(), name).map_err(|e| bad(&e))?;
        let mut below = TransportAdapter::new(transport.boxed(), details.current_time.clone());
        below.set_timeout(details.timeout);
        while connection.is_handshaking() {
            connection.complete_io(&mut below)?;
        }
        Ok(Some(Either::B(TlsTransport {
            buffers: LazyBuffers::new(
                details.config.input_buffer_size(),
                details.config.output_buffer_size(),
            ),
            stream: StreamOwned::new(connection, below),
        })))
    }
}

struct TlsTransport {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter>,
}

impl fmt::Debug for TlsTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsTransport")
    }
}

impl Transport for TlsTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(
        &mut self,
        amount: usize,
        timeout: NextTimeout,
    ) -> std::result::Result<(), Error> {
        self.stream.get_mut().set_timeout(timeout);
        let output = &self.buffers.output()[..amount];
        self.stream.write_all(output)?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> std::result::Result<bool, Error> {
        self.stream.get_mut().set_timeout(timeout);
        let input = self.buffers.input_append_buf();
        let amount = self.stream.read(input)?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.get_mut().get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}
