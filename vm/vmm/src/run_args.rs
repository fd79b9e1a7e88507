//! The command line of `vireo-vmm run`: a throw-away machine on the terminal.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use block::{Action, BlockError, Format};
use monitor::{
    Accel, Boot, CacheMode, ChainLink, ClockMode, Discard, DiskBus, DiskErrorPolicy, DiskFormat, DiskIo, FdIndex,
    PowerAction, VmConfig,
};

use crate::error::VmmError;

/// How to call it.
pub const USAGE: &str = "\
usage: vireo run --kernel FILE [options]      (vireo-vmm run is the same)
  --kernel FILE          Linux kernel: bzImage, or ELF with a PVH entry
  --initrd FILE          initial ram disk
  --append TEXT          kernel command line; several are joined with a space
  --memory SIZE          MiB, or with suffix M or G (default 512)
  --cpus N               vCPUs (default 1)
  --disk FILE[,format=raw|qcow2][,bus=virtio|nvme][,serial=TEXT][,readonly=on|off]
         [,cache=writeback|none|writethrough|directsync|unsafe][,io=threads|native|io_uring]
                         without a format the file is probed
  --rng                  a virtio source of random bytes
  --accel auto|soft|kvm  what executes the guest (default auto)
  --clock host|virtual   guest time: the host's, or instructions retired (repeatable runs)
  --no-reboot            end when the guest resets
  --no-sandbox           for debugging this program
  --stats FILE           write counters as JSON at the end
The guest's serial port is the terminal. Ctrl+] ends it.
";

/// What is wrong with a command line.
#[derive(Debug, thiserror::Error)]
pub enum ArgsError {
    /// Not an option.
    #[error("'{option}' is no option of this command: --help lists them")]
    Unknown {
        /// What was given.
        option: String,
    },
    /// An option without its value.
    #[error("{option} needs a value")]
    NoValue {
        /// Which option.
        option: &'static str,
    },
    /// A value that does not parse.
    #[error("{option}: '{value}' is not {want}")]
    Value {
        /// Which option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        want: &'static str,
    },
    /// No kernel.
    #[error("--kernel is missing: it names what is booted")]
    NoKernel,
}

/// A parsed command line.
#[derive(Debug, PartialEq)]
pub struct RunArgs {
    /// `--kernel`
    pub kernel: PathBuf,
    /// `--initrd`
    pub initrd: Option<PathBuf>,
    /// `--append`
    pub cmdline: String,
    /// `--memory`
    pub memory_kib: u64,
    /// `--cpus`
    pub vcpus: u32,
    /// `--disk`, in order.
    pub disks: Vec<DiskArg>,
    /// `--rng`
    pub rng: bool,
    /// `--accel`
    pub accel: Accel,
    /// `--clock`
    pub clock: ClockMode,
    /// Absence of `--no-reboot`.
    pub reboot: bool,
    /// Absence of `--no-sandbox`.
    pub sandbox: bool,
    /// `--stats`
    pub stats: Option<PathBuf>,
}

/// One `--disk`.
#[derive(Debug, PartialEq)]
pub struct DiskArg {
    /// The image.
    pub path: PathBuf,
    /// `None`: probe.
    pub format: Option<Format>,
    /// Controller.
    pub bus: DiskBus,
    /// Serial number.
    pub serial: Option<String>,
    /// The guest cannot write.
    pub read_only: bool,
    /// Host caching.
    pub cache: CacheMode,
    /// Who waits for transfers.
    pub io: DiskIo,
}

impl DiskArg {
    fn new(path: PathBuf) -> DiskArg {
        DiskArg {
            path,
            format: None,
            bus: DiskBus::Virtio,
            serial: None,
            read_only: false,
            cache: CacheMode::Writeback,
            io: DiskIo::Auto,
        }
    }

    fn is_direct(&self) -> bool {
        matches!(self.cache, CacheMode::None | CacheMode::DirectSync)
    }
}

/// Parses what follows `run`. `None`: help is wanted.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Option<RunArgs>, ArgsError> {
    let mut parsed = RunArgs {
        kernel: PathBuf::new(),
        initrd: None,
        cmdline: String::new(),
        memory_kib: 512 << 10,
        vcpus: 1,
        disks: Vec::new(),
        rng: false,
        accel: Accel::Auto,
        clock: ClockMode::Host,
        reboot: true,
        sandbox: true,
        stats: None,
    };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let mut value = |option| args.next().ok_or(ArgsError::NoValue { option });
        let mut text = |option| value(option).map(|v| v.to_string_lossy().into_owned());
        match arg.to_str().unwrap_or_default() {
            "--help" | "-h" => return Ok(None),
            "--kernel" => parsed.kernel = value("--kernel")?.into(),
            "--initrd" => parsed.initrd = Some(value("--initrd")?.into()),
            "--append" => {
                let more = text("--append")?;
                if !parsed.cmdline.is_empty() {
                    parsed.cmdline.push(' ');
                }
                parsed.cmdline.push_str(&more);
            }
            "--memory" => parsed.memory_kib = memory_kib(text("--memory")?)?,
            "--cpus" => {
                let value = text("--cpus")?;
                let want = "a number of vCPUs";
                parsed.vcpus = value.parse().map_err(|_| ArgsError::Value { option: "--cpus", value, want })?;
            }
            "--disk" => parsed.disks.push(disk(&text("--disk")?)?),
            "--rng" => parsed.rng = true,
            "--accel" => {
                let words = [("auto", Accel::Auto), ("soft", Accel::Soft), ("kvm", Accel::Kvm)];
                parsed.accel = choose("--accel", text("--accel")?, &words, "auto, soft or kvm")?;
            }
            "--clock" => {
                let words = [("host", ClockMode::Host), ("virtual", ClockMode::Virtual)];
                parsed.clock = choose("--clock", text("--clock")?, &words, "host or virtual")?;
            }
            "--no-reboot" => parsed.reboot = false,
            "--no-sandbox" => parsed.sandbox = false,
            "--stats" => parsed.stats = Some(value("--stats")?.into()),
            _ => return Err(ArgsError::Unknown { option: arg.to_string_lossy().into_owned() }),
        }
    }
    if parsed.kernel.as_os_str().is_empty() {
        return Err(ArgsError::NoKernel);
    }
    Ok(Some(parsed))
}

fn choose<T: Copy>(
    option: &'static str,
    value: String,
    words: &[(&str, T)],
    want: &'static str,
) -> Result<T, ArgsError> {
    let found = words.iter().find(|(word, _)| *word == value).map(|(_, meaning)| *meaning);
    found.ok_or(ArgsError::Value { option, value, want })
}

fn memory_kib(value: String) -> Result<u64, ArgsError> {
    let (digits, shift) = match value.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 20),
        None => (value.strip_suffix(['M', 'm']).unwrap_or(&value), 10),
    };
    let kib = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).filter(|&kib| kib != 0);
    kib.ok_or(ArgsError::Value { option: "--memory", value, want: "a size in MiB, or one like 2G" })
}

const CACHE_MODES: [(&str, CacheMode); 5] = [
    ("writeback", CacheMode::Writeback),
    ("none", CacheMode::None),
    ("writethrough", CacheMode::Writethrough),
    ("directsync", CacheMode::DirectSync),
    ("unsafe", CacheMode::Unsafe),
];

fn disk(value: &str) -> Result<DiskArg, ArgsError> {
    let bad = |want| ArgsError::Value { option: "--disk", value: value.to_owned(), want };
    let mut parsed = DiskArg::new(PathBuf::new());
    for (place, part) in value.split(',').enumerate() {
        match part.split_once('=') {
            Some(("path", path)) => parsed.path = path.into(),
            Some(("format", "raw")) => parsed.format = Some(Format::Raw),
            Some(("format", "qcow2")) => parsed.format = Some(Format::Qcow2),
            Some(("format", _)) => return Err(bad("a disk whose format is raw or qcow2")),
            Some(("bus", "virtio")) => parsed.bus = DiskBus::Virtio,
            Some(("bus", "nvme")) => parsed.bus = DiskBus::Nvme,
            Some(("bus", _)) => return Err(bad("a disk whose bus is virtio or nvme")),
            Some(("serial", serial)) => parsed.serial = Some(serial.to_owned()),
            Some(("readonly", "on" | "yes" | "true")) => parsed.read_only = true,
            Some(("readonly", "off" | "no" | "false")) => parsed.read_only = false,
            Some(("cache", word)) => {
                let cache = CACHE_MODES.iter().find(|(known, _)| *known == word);
                parsed.cache = cache.ok_or_else(|| bad("a disk with a cache mode that exists"))?.1;
            }
            Some(("io", "threads")) => parsed.io = DiskIo::Threads,
            Some(("io", "native" | "io_uring")) => parsed.io = DiskIo::Ring,
            Some(("io", _)) => return Err(bad("a disk whose io is threads, native or io_uring")),
            None if part == "ro" || part == "readonly" => parsed.read_only = true,
            _ if place == 0 => parsed.path = part.into(),
            _ => return Err(bad("FILE[,format=][,bus=][,serial=][,readonly=][,cache=][,io=], as --help shows")),
        }
    }
    if parsed.path.as_os_str().is_empty() { Err(bad("the path of an image")) } else { Ok(parsed) }
}

impl RunArgs {
    /// Opens the files and writes the configuration that refers to them.
    pub fn open(&self) -> Result<(VmConfig, Vec<OwnedFd>), VmmError> {
        let mut files = Vec::new();
        let mut add = |fd: OwnedFd| {
            files.push(fd);
            FdIndex(files.len() as u32 - 1)
        };
        let kernel = add(open("kernel", &self.kernel)?);
        let initrd = self.initrd.as_deref().map(|path| open("initrd", path)).transpose()?.map(&mut add);
        let mut disks = Vec::new();
        for (disk, letter) in self.disks.iter().zip('a'..='z') {
            disks.push(open_disk(disk, format!("vd{letter}"), &mut add)?);
        }
        let config = VmConfig {
            name: "run".into(),
            uuid: String::new(),
            machine: machine::layout::MACHINE_TYPE.into(),
            accel: self.accel,
            memory_kib: self.memory_kib,
            vcpus: self.vcpus,
            boot: Boot::Kernel { kernel, initrd, cmdline: self.cmdline.clone() },
            disks,
            consoles: Vec::new(),
            rng: self.rng,
            clock: self.clock,
            rtc_localtime: false,
            paused: false,
            on_poweroff: PowerAction::Destroy,
            on_reboot: if self.reboot { PowerAction::Restart } else { PowerAction::Destroy },
            on_crash: PowerAction::Destroy,
            monitor: None,
            sandbox: self.sandbox,
            block_cache_bytes: hv_soft::SoftConfig::default().block_cache_bytes,
        };
        Ok((config, files))
    }
}

fn open(what: &'static str, path: &Path) -> Result<OwnedFd, VmmError> {
    let file = File::open(path).map_err(|source| VmmError::Open { what, path: path.to_owned(), source })?;
    Ok(file.into())
}

fn open_disk(
    disk: &DiskArg,
    target: String,
    add: &mut impl FnMut(OwnedFd) -> FdIndex,
) -> Result<monitor::Disk, VmmError> {
    let failed = |source: BlockError| VmmError::Disk { target: target.clone(), source };
    let chain = block::resolve_chain(&disk.path, disk.format, disk.read_only, true).map_err(failed)?;
    let mut links = Vec::new();
    for link in chain {
        let format = match link.format {
            Format::Raw => DiskFormat::Raw,
            Format::Qcow2 => DiskFormat::Qcow2,
            other => {
                let source = BlockError::BackingFormat { path: link.path_label, format: other.name().to_owned() };
                return Err(failed(source));
            }
        };
        if disk.is_direct() {
            let source = |source| BlockError::Io { path: link.path_label.clone(), action: Action::Open, source };
            block::use_direct_io(&link.file).map_err(|error| failed(source(error)))?;
        }
        let path = link.path_label.to_string_lossy().into_owned();
        links.push(ChainLink { file: add(link.file.into()), path, format });
    }
    Ok(monitor::Disk {
        read_only: disk.read_only,
        serial: disk.serial.clone(),
        cache: disk.cache,
        io: disk.io,
        discard: Discard::Unmap,
        // Nobody could make the machine go on after a pause.
        on_write_error: DiskErrorPolicy::Report,
        on_read_error: DiskErrorPolicy::Report,
        ..monitor::Disk::new(target, disk.bus, links)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Option<RunArgs>, ArgsError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn options_are_understood() {
        let args = run("--kernel k --initrd i --append a=1 --append b --memory 2G --cpus 3 --accel soft \
                        --clock virtual --no-reboot --stats s --disk d.img --disk path=e,format=raw,bus=nvme,ro")
        .unwrap()
        .unwrap();
        assert_eq!((args.cmdline.as_str(), args.memory_kib, args.vcpus), ("a=1 b", 2 << 20, 3));
        assert_eq!((args.accel, args.clock, args.reboot), (Accel::Soft, ClockMode::Virtual, false));
        let plain = |path: &str| DiskArg::new(path.into());
        let second = DiskArg { format: Some(Format::Raw), bus: DiskBus::Nvme, read_only: true, ..plain("e") };
        assert_eq!(args.disks, [plain("d.img"), second]);
        let args = run("--kernel k --disk d,cache=none,io=native --disk e,cache=unsafe,io=threads").unwrap().unwrap();
        let third = DiskArg { cache: CacheMode::None, io: DiskIo::Ring, ..plain("d") };
        assert_eq!(args.disks, [third, DiskArg { cache: CacheMode::Unsafe, io: DiskIo::Threads, ..plain("e") }]);
        assert_eq!(run("--help").unwrap(), None);
    }

    #[test]
    fn mistakes_are_named() {
        for (line, message) in [
            ("", "--kernel is missing: it names what is booted"),
            ("--kernel", "--kernel needs a value"),
            ("--kernel k --frob", "'--frob' is no option of this command: --help lists them"),
            ("--kernel k --memory 0", "--memory: '0' is not a size in MiB, or one like 2G"),
            (
                "--kernel k --memory 99999999999999999G",
                "--memory: '99999999999999999G' is not a size in MiB, or one like 2G",
            ),
            ("--kernel k --cpus x", "--cpus: 'x' is not a number of vCPUs"),
            ("--kernel k --accel tcg", "--accel: 'tcg' is not auto, soft or kvm"),
            ("--kernel k --disk a,format=vmdk", "--disk: 'a,format=vmdk' is not a disk whose format is raw or qcow2"),
            ("--kernel k --disk a,cache=x", "--disk: 'a,cache=x' is not a disk with a cache mode that exists"),
            ("--kernel k --disk a,io=x", "--disk: 'a,io=x' is not a disk whose io is threads, native or io_uring"),
            ("--kernel k --disk ro", "--disk: 'ro' is not the path of an image"),
        ] {
            assert_eq!(run(line).unwrap_err().to_string(), message);
        }
    }
}
