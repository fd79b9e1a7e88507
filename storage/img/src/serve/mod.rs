//! `serve`, and the name `qemu-nbd`: shows an image to NBD clients, with qemu-nbd's options.
//!
//! The socket is there when clients can connect. The server ends with the last client (unless `-t`) or on SIGTERM,
//! SIGINT or SIGHUP; what clients wrote is on the disk then.

mod background;
mod list;

use std::ffi::{OsStr, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use block::nbd::{CLIENTS_UNLIMITED, Listener, NbdError, ServeOptions, Stop, serve};
use block::spec::{NBD_PORT, NbdAddress, NbdTls};
use block::{BitmapBits, BlockError, CacheMode, DetectZeroes, Discard, Disk, MaintenanceError, OpenOptions};
use thiserror::Error;

use crate::Command;
use crate::error::{ImgError, Rule, chain, host, why};
use crate::getopt::{FORMAT, IMAGE_OPTS, OBJECT, Opt, Parsed, flag, opt};
use crate::open::{self, Access, Named};
use crate::secret::Secrets;
use crate::size;
use crate::tls_creds::TlsCreds;

/// `serve`.
pub const COMMAND: Command =
    Command { name: "serve", about: "Serve an image to NBD clients", operands: "FILE", options: OPTIONS, run };

const OPTIONS: &[Opt] = &[
    opt('p', &["port"], "PORT", "port to listen on (10809)"),
    opt('b', &["bind"], "ADDRESS", "address to listen on (0.0.0.0)"),
    opt('k', &["socket"], "PATH", "listen on a Unix socket"),
    opt('e', &["shared"], "NUM", "most clients at once (1); 0: as many as come"),
    flag('t', &["persistent"], "go on when the last client has left"),
    flag('v', &["verbose"], "tell of connections that end badly"),
    opt('x', &["export-name"], "NAME", "name of the export (empty)"),
    opt('D', &["description"], "TEXT", "what the export is, for people"),
    opt('\0', &["handshake-limit"], "N", "seconds that a client has to agree on options (10); 0: no limit"),
    opt('o', &["offset"], "OFFSET", "where in the disk the export starts"),
    flag('A', &["allocation-depth"], "tell in which image of the chain data is"),
    opt('B', &["bitmap"], "NAME", "tell what a persistent bitmap holds"),
    flag('L', &["list"], "list what another server exports"),
    OBJECT,
    opt('\0', &["tls-creds"], "ID", "encrypt connections with these credentials, and take no others"),
    opt('\0', &["tls-authz"], "ID", "who may connect"),
    opt('\0', &["tls-hostname"], "NAME", "with -L: name in the server's certificate"),
    opt('T', &["trace"], "TRACE", "QEMU's tracing; nothing here"),
    flag('\0', &["fork"], "go into the background when clients can connect"),
    opt('\0', &["pid-file"], "PATH", "write the process id to this file"),
    opt('\0', &["selinux-label"], "LABEL", "label of the socket"),
    opt('c', &["connect"], "DEV", "use a device of the host's kernel"),
    flag('d', &["disconnect"], "free a device of the host's kernel"),
    FORMAT,
    flag('r', &["read-only"], "nobody may write"),
    flag('s', &["snapshot"], "keep writes in a temporary file"),
    flag('\0', &["resizable"], "clients may change the size (NBD's extension RESIZE); not with -r"),
    opt('l', &["load-snapshot"], "SNAPSHOT", "show this internal snapshot, read only"),
    flag('n', &["nocache"], "short for --cache=none"),
    opt('\0', &["cache"], "MODE", "none, writeback (default), writethrough, directsync, unsafe"),
    opt('\0', &["aio"], "MODE", "how the host is asked; threads here"),
    opt('\0', &["discard"], "MODE", "unmap: a discard gives space back; ignore (default)"),
    opt('\0', &["detect-zeroes"], "MODE", "on, unmap: data of zeroes becomes zeroes; off (default)"),
    IMAGE_OPTS,
];

/// Why nothing is served.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum ServeError {
    #[error("Invalid {what} '{found}'")]
    Value { what: &'static str, found: String },
    #[error("Invalid {what} mode `{found}'")]
    Mode { what: &'static str, found: String },
    #[error("Failed to parse detect_zeroes mode: invalid parameter value: {0}")]
    DetectZeroes(String),
    #[error("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")]
    ZeroesNeedUnmap,
    #[error("-n and --cache can only be specified once")]
    CacheTwice,
    #[error("socket path must be absolute")]
    RelativeSocket,
    #[error("{what} of {bytes} bytes is too long; at most 4096 are allowed")]
    TooLong { what: &'static str, bytes: usize },
    #[error("--{option} can only be specified once")]
    Twice { option: &'static str },
    #[error("{what} can't be set when using socket activation")]
    Activated { what: &'static str },
    #[error("qemu-nbd does not support socket activation with LISTEN_FDS > 1")]
    ManySockets,
    #[error("List mode is incompatible with a file name")]
    ListWithFile,
    #[error("List mode is incompatible with an export name")]
    ListWithName,
    #[error("Invalid number of arguments")]
    Arguments,
    #[error("--tls-hostname is not permitted without --tls-creds")]
    HostnameAlone,
    #[error("TLS hostname is only supported with export list")]
    HostnameOfServer,
    #[error("Failed to get TLS creds: {0}")]
    Creds(Rule),
    #[error(
        "the option {option} needs the NBD device of the host's kernel, which is not supported; connect a client to the socket"
    )]
    KernelDevice { option: &'static str },
    #[error("the option {option} is not supported; {instead}")]
    NotSupported { option: &'static str, instead: &'static str },
    #[error("Failed to blk_new_open '{name}': {reason}", reason = reason(source))]
    Open { name: String, source: Box<ImgError> },
    #[error("Bitmap '{name}' is not found")]
    NoBitmap { name: String },
    #[error("Bitmap '{name}' cannot be used: {}", why(source))]
    Bitmap { name: String, source: BlockError },
    #[error("{}", chain(.0))]
    Nbd(#[from] NbdError),
    #[error("Could not create '{path}': {}", host(source), path = path.display())]
    PidFile { path: PathBuf, source: std::io::Error },
    #[error("Cannot lock pid file: {}", host(source))]
    PidLock { source: std::io::Error },
    #[error("cannot go into the background: {}", host(source))]
    Background { source: std::io::Error },
    #[error("cannot be told to stop: {}", host(source))]
    Signals { source: std::io::Error },
    #[error("what clients wrote may not be on the disk: {}", why(source))]
    Flush { source: BlockError },
}

/// qemu-nbd's form of a refusal to open.
fn reason(error: &ImgError) -> String {
    match error {
        ImgError::Open { source, .. } => why(source),
        ImgError::OpenRule { reason, .. } => reason.to_string(),
        other => other.to_string(),
    }
}

/// What a signal pulls.
static STOP: OnceLock<Stop> = OnceLock::new();

extern "C" fn on_signal(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    if let Some(stop) = STOP.get() {
        stop.stop();
    }
}

fn run(parsed: &Parsed) -> Result<u8, ImgError> {
    refuse_unsupported(parsed)?;
    let is_activated = is_activated(parsed)?;
    let place = place(parsed)?;
    let creds = tls_creds(parsed)?;
    if parsed.has("list") {
        if !parsed.words.is_empty() {
            return Err(ServeError::ListWithFile.into());
        }
        if parsed.has("export-name") {
            return Err(ServeError::ListWithName.into());
        }
        let hostname = parsed.value("tls-hostname")?.map(str::to_owned);
        let client = creds.as_ref().map(|creds| creds.client()).transpose().map_err(ServeError::Creds)?;
        let tls = client.map(|client| (client, NbdTls { creds: None, hostname }));
        return list::print(place, tls);
    }
    let server = creds.as_ref().map(|creds| creds.server().cloned()).transpose().map_err(ServeError::Creds)?;
    let options = ServeOptions { tls: server, ..serve_options(parsed)? };
    let [file] = parsed.words.as_slice() else { return Err(ServeError::Arguments.into()) };
    if parsed.has("fork") && !background::is_child() {
        return background::start(is_activated);
    }
    let disk = open_disk(parsed, file)?;
    if options.offset > 0 && options.offset >= disk.size_bytes() {
        return Err(bad_offset(parsed.value("offset")?.unwrap_or_default()).into());
    }
    let options = ServeOptions { bitmaps: bitmaps(parsed, &disk, options.read_only)?, ..options };
    let report = |error: &block::nbd::PeerError| crate::warn(&chain(error));
    let options = ServeOptions { report: parsed.has("verbose").then_some(&report), ..options };
    let stop = ready_to_stop()?;
    let listener = match (is_activated, &place) {
        (true, _) => Listener::inherited(FIRST_INHERITED),
        (false, NbdAddress::Unix(path)) => Listener::unix(path),
        (false, NbdAddress::Tcp { host, port }) => Listener::tcp(host, *port),
    };
    let listener = listener.map_err(ServeError::Nbd)?;
    let pid_file = parsed.os_value("pid-file").map(|path| background::write_pid(Path::new(path))).transpose()?;
    if background::is_child() {
        background::detach(parsed.has("verbose"))?;
    }
    let served = serve(&listener, &disk, &options, stop);
    drop(listener);
    drop(pid_file);
    disk.flush().map_err(|source| ServeError::Flush { source })?;
    served.map_err(ServeError::Nbd)?;
    Ok(0)
}

/// Where descriptors of socket activation begin, `sd_listen_fds(3)`.
const FIRST_INHERITED: i32 = 3;

/// Whether whoever started this process has opened the socket, as systemd does, and libnbd for `[ qemu-nbd ... ]`.
fn is_activated(parsed: &Parsed) -> Result<bool, ServeError> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    if background::has_sockets_of_parent() {
        return Ok(true);
    }
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(false);
    }
    let Some(count) = number("LISTEN_FDS").filter(|count| *count > 0) else { return Ok(false) };
    if count > 1 {
        return Err(ServeError::ManySockets);
    }
    for (option, what) in
        [("socket", "Unix socket"), ("bind", "The interface"), ("port", "TCP port number"), ("list", "List mode")]
    {
        if parsed.has(option) {
            return Err(ServeError::Activated { what });
        }
    }
    Ok(true)
}

fn ready_to_stop() -> Result<&'static Stop, ServeError> {
    let stop = Stop::new().map_err(|source| ServeError::Signals { source })?;
    let stop = STOP.get_or_init(|| stop);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        vmm_sys_util::signal::register_signal_handler(signal, on_signal)
            .map_err(|errno| ServeError::Signals { source: errno.into() })?;
    }
    Ok(stop)
}

fn refuse_unsupported(parsed: &Parsed) -> Result<(), ServeError> {
    for (name, option) in [("connect", "-c"), ("disconnect", "-d")] {
        if parsed.has(name) {
            return Err(ServeError::KernelDevice { option });
        }
    }
    for (name, option, instead) in [
        ("tls-authz", "--tls-authz", "whoever 'ca-cert.pem' has signed may connect"),
        ("selinux-label", "--selinux-label", "label the socket's directory"),
    ] {
        if parsed.has(name) {
            return Err(ServeError::NotSupported { option, instead });
        }
    }
    Ok(())
}

/// What `--tls-creds` names; the rules are qemu-nbd's.
fn tls_creds(parsed: &Parsed) -> Result<Option<TlsCreds>, ImgError> {
    match parsed.value("tls-creds")? {
        None if parsed.has("tls-hostname") => Err(ServeError::HostnameAlone.into()),
        Some(_) if parsed.has("tls-hostname") && !parsed.has("list") => Err(ServeError::HostnameOfServer.into()),
        None => Ok(None),
        Some(id) => Ok(Some(Secrets::of(parsed)?.tls(id).map_err(ServeError::Creds)?.clone())),
    }
}

/// Where to listen, or what to list.
fn place(parsed: &Parsed) -> Result<NbdAddress, ImgError> {
    let port = match parsed.value("port")? {
        None => NBD_PORT,
        Some(text) => text.parse().map_err(|_| ServeError::Value { what: "port", found: text.to_owned() })?,
    };
    let Some(path) = parsed.os_value("socket") else {
        let host = parsed.value("bind")?.unwrap_or(if parsed.has("list") { "localhost" } else { "0.0.0.0" });
        return Ok(NbdAddress::Tcp { host: host.to_owned(), port });
    };
    if !Path::new(path).is_absolute() {
        return Err(ServeError::RelativeSocket.into());
    }
    Ok(NbdAddress::Unix(path.into()))
}

fn text(parsed: &Parsed, option: &'static str, what: &'static str) -> Result<String, ImgError> {
    let text = parsed.value(option)?.unwrap_or_default();
    match text.len() {
        bytes @ 4097.. => Err(ServeError::TooLong { what, bytes }.into()),
        _ => Ok(text.to_owned()),
    }
}

fn serve_options(parsed: &Parsed) -> Result<ServeOptions<'static>, ImgError> {
    let number = |option: &'static str, what: &'static str, default: u32| -> Result<u32, ImgError> {
        match parsed.value(option)? {
            None => Ok(default),
            Some(text) => integer(text).ok_or_else(|| ServeError::Value { what, found: text.to_owned() }.into()),
        }
    };
    let max_clients = match number("shared", "shared device number", 1)? {
        count if i32::try_from(count).is_err() => {
            let found = parsed.value("shared")?.unwrap_or_default().to_owned();
            return Err(ServeError::Value { what: "shared device number", found }.into());
        }
        0 => CLIENTS_UNLIMITED,
        count => count as usize,
    };
    let limit = number("handshake-limit", "handshake limit", 10)?;
    Ok(ServeOptions {
        name: text(parsed, "export-name", "the export name")?,
        description: text(parsed, "description", "the description")?,
        read_only: parsed.has("read-only") || parsed.has("load-snapshot"),
        resizable: parsed.has("resizable"),
        allocation_depth: parsed.has("allocation-depth"),
        max_clients,
        offset: offset(parsed)?,
        persistent: parsed.has("persistent"),
        handshake_limit: (limit > 0).then(|| Duration::from_secs(u64::from(limit))),
        ..ServeOptions::default()
    })
}

/// A number of 32 bits as C writes them, without a sign.
fn integer(text: &str) -> Option<u32> {
    let digits = Some(text).filter(|text| text.starts_with(|first: char| first.is_ascii_digit()))?;
    size::integer(digits).ok()?.try_into().ok()
}

/// Refuses what may be said only once.
fn refuse_repeats(parsed: &Parsed) -> Result<(), ServeError> {
    let count = |names: &[&str]| parsed.in_order().filter(|(name, _)| names.contains(name)).count();
    if count(&["nocache", "cache"]) > 1 {
        return Err(ServeError::CacheTwice);
    }
    match ["aio", "discard"].into_iter().find(|option| count(&[option]) > 1) {
        Some(option) => Err(ServeError::Twice { option }),
        None => Ok(()),
    }
}

fn open_disk(parsed: &Parsed, file: &OsStr) -> Result<Disk, ImgError> {
    refuse_repeats(parsed)?;
    let cache = match (parsed.has("nocache"), parsed.value("cache")?) {
        (true, _) => CacheMode::None,
        (false, name) => open::cache_named("", name, CacheMode::Writeback)
            .map_err(|_| ServeError::Mode { what: "cache", found: name.unwrap_or_default().to_owned() })?,
    };
    let discard = match parsed.value("discard")? {
        None | Some("ignore" | "off") => Discard::Ignore,
        Some("unmap" | "on") => Discard::Unmap,
        Some(other) => return Err(ServeError::Mode { what: "discard", found: other.to_owned() }.into()),
    };
    let detect_zeroes = match parsed.value("detect-zeroes")? {
        None | Some("off") => DetectZeroes::Off,
        Some("on") => DetectZeroes::On,
        Some("unmap") if discard == Discard::Unmap => DetectZeroes::Unmap,
        Some("unmap") => return Err(ServeError::ZeroesNeedUnmap.into()),
        Some(other) => return Err(ServeError::DetectZeroes(other.to_owned()).into()),
    };
    if let Some(mode) = parsed.value("aio")?.filter(|mode| !matches!(*mode, "threads" | "native" | "io_uring")) {
        return Err(ServeError::Value { what: "aio mode", found: mode.to_owned() }.into());
    }
    let write = !parsed.has("read-only") && !parsed.has("load-snapshot");
    let failed = |error| ServeError::Open { name: file.to_string_lossy().into_owned(), source: Box::new(error) };
    let named = Named::of(parsed, file, "format").map_err(failed)?;
    if parsed.value("aio")? == Some("native") && !cache.is_direct() {
        return Err(failed(ImgError::Plain(Rule::NativeNeedsDirect)).into());
    }
    let write = write && named.spec.read_only != Some(true);
    let options = OpenOptions { discard, detect_zeroes, ..OpenOptions::default() };
    let access = Access { write, share: false, cache };
    let disk = open::disk_with_scratch(&named, access, options, parsed.has("snapshot")).map_err(failed)?;
    if let Some(snapshot) = parsed.value("load-snapshot")? {
        open::show_snapshot(&disk, snapshot)?;
    }
    Ok(disk)
}

/// The bitmaps whose marks clients can ask for; the last one first, as qemu-nbd.
fn bitmaps(parsed: &Parsed, disk: &Disk, read_only: bool) -> Result<Vec<(String, BitmapBits)>, ImgError> {
    let names = parsed.values("bitmap")?;
    if !names.is_empty() && !read_only {
        return Err(ServeError::NotSupported { option: "-B without -r", instead: "add -r" }.into());
    }
    let missing = |name: &str| ServeError::NoBitmap { name: name.to_owned() };
    let found = names.into_iter().map(|name| {
        let image = disk.qcow2().ok_or_else(|| missing(name))?;
        let bits = image.bitmap_bits(name).map_err(|source| match source {
            BlockError::Maintenance { source: MaintenanceError::BitmapNotFound { .. }, .. } => missing(name),
            source => ServeError::Bitmap { name: name.to_owned(), source },
        })?;
        Ok((name.to_owned(), bits))
    });
    let mut found: Vec<_> = found.collect::<Result<_, ImgError>>()?;
    found.reverse();
    Ok(found)
}

/// Where in the disk the export starts.
fn offset(parsed: &Parsed) -> Result<u64, ImgError> {
    let Some(text) = parsed.value("offset")? else { return Ok(0) };
    size::disk_bytes(text).map_err(|_| bad_offset(text).into())
}

fn bad_offset(found: &str) -> ServeError {
    ServeError::Value { what: "offset", found: found.to_owned() }
}
