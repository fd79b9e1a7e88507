//! Where everything lies. Client-visible places are libvirt's, so that an installation can be taken over.

use std::env;
use std::path::PathBuf;

use crate::options::{Mode, Options};

/// The directories and sockets of one daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Domain definitions, `NAME.xml`.
    pub definitions: PathBuf,
    /// Symlinks to the definitions that start by themselves.
    pub autostart: PathBuf,
    /// State of running domains and their monitor sockets; gone after a reboot.
    pub state: PathBuf,
    /// What each vireo-vmm printed, `NAME.log`.
    pub logs: PathBuf,
    /// Sockets that take every call.
    pub sockets: Vec<PathBuf>,
    /// Sockets whose clients may only read.
    pub read_only_sockets: Vec<PathBuf>,
}

/// A variable of the environment that is needed and missing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("neither {0} nor HOME is set: a session daemon has no place for its files; set one or give --root DIR")]
pub struct NoHome(pub &'static str);

impl Paths {
    /// The places for `options`; session directories come from the XDG variables in the environment.
    pub fn new(options: &Options) -> Result<Paths, NoHome> {
        match (&options.root, options.mode) {
            (Some(root), _) => Ok(Paths::system(root.clone())),
            (None, Mode::System) => Ok(Paths::system("/".into())),
            (None, Mode::Session) => Paths::session(),
        }
    }

    fn system(root: PathBuf) -> Paths {
        let run = root.join("run/libvirt");
        let definitions = root.join("etc/libvirt/qemu");
        Paths {
            autostart: definitions.join("autostart"),
            definitions,
            state: run.join("qemu"),
            logs: root.join("var/log/libvirt/qemu"),
            sockets: ["libvirt-sock", "virtqemud-sock"].map(|name| run.join(name)).to_vec(),
            read_only_sockets: ["libvirt-sock-ro", "virtqemud-sock-ro"].map(|name| run.join(name)).to_vec(),
        }
    }

    fn session() -> Result<Paths, NoHome> {
        let config = xdg("XDG_CONFIG_HOME", ".config")?;
        let cache = xdg("XDG_CACHE_HOME", ".cache")?;
        // Without a runtime directory libvirt's clients look below the cache directory.
        let run = match env::var_os("XDG_RUNTIME_DIR") {
            Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("libvirt"),
            _ => cache.join("libvirt"),
        };
        let definitions = config.join("libvirt/qemu");
        Ok(Paths {
            autostart: definitions.join("autostart"),
            definitions,
            state: run.join("qemu/run"),
            logs: cache.join("libvirt/qemu/log"),
            sockets: ["libvirt-sock", "virtqemud-sock"].map(|name| run.join(name)).to_vec(),
            read_only_sockets: Vec::new(),
        })
    }
}

fn xdg(variable: &'static str, below_home: &str) -> Result<PathBuf, NoHome> {
    match env::var_os(variable) {
        Some(dir) if !dir.is_empty() => Ok(dir.into()),
        _ => match env::var_os("HOME") {
            Some(home) if !home.is_empty() => Ok(PathBuf::from(home).join(below_home)),
            _ => Err(NoHome(variable)),
        },
    }
}
