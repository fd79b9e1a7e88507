//! Lists of `name=value` behind `-o`: which names a format has, what their values are, and how they are echoed.

use crate::error::ImgError;
use crate::size;

/// What a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// `on` or `off`.
    Switch,
    /// Bytes, with a suffix.
    Size,
    /// A number.
    Number,
}

/// A name a format knows.
#[derive(Debug)]
pub struct Def {
    /// Name.
    pub name: &'static str,
    /// What its value is.
    pub kind: Kind,
    /// What holds if it is not given and is echoed all the same.
    pub default: &'static str,
    /// What it does, for `-o help`.
    pub help: &'static str,
}

const fn def(name: &'static str, kind: Kind, help: &'static str) -> Def {
    Def { name, kind, default: "", help }
}
const fn with_default(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Def {
    Def { name, kind, default, help }
}

const SIZE: Def = def("size", Kind::Size, "Virtual disk size");
const BACKING_FILE: Def = def("backing_file", Kind::Text, "File name of a base image");
const BACKING_FMT: Def = def("backing_fmt", Kind::Text, "Image format of the base image");
const COMPAT: Def = def("compat", Kind::Text, "Compatibility level (v2 [0.10] or v3 [1.1])");
const DATA_FILE: Def = def("data_file", Kind::Text, "File name of an external data file");
const DATA_FILE_RAW: Def = def("data_file_raw", Kind::Switch, "The external data file must stay valid as a raw image");
const LAZY_REFCOUNTS: Def = def("lazy_refcounts", Kind::Switch, "Postpone refcount updates");
const REFCOUNT_BITS: Def = def("refcount_bits", Kind::Number, "Width of a reference count entry in bits");
const ITER_TIME: Def = def("iter-time", Kind::Number, "Time to spend in PBKDF in milliseconds");
const ENCRYPT_ITER_TIME: Def = Def { name: "encrypt.iter-time", ..ITER_TIME };

/// The order is that of the line `create` prints.
const QCOW2: &[Def] = &[
    def("encryption", Kind::Switch, "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"),
    def("encrypt.format", Kind::Text, "Encrypt the image, format choices: 'aes', 'luks'"),
    def("encrypt.key-secret", Kind::Text, "ID of secret providing qcow AES key or LUKS passphrase"),
    def("encrypt.cipher-alg", Kind::Text, "Name of encryption cipher algorithm"),
    def("encrypt.cipher-mode", Kind::Text, "Name of encryption cipher mode"),
    def("encrypt.ivgen-alg", Kind::Text, "Name of IV generator algorithm"),
    def("encrypt.ivgen-hash-alg", Kind::Text, "Name of IV generator hash algorithm"),
    def("encrypt.hash-alg", Kind::Text, "Name of encryption hash algorithm"),
    ENCRYPT_ITER_TIME,
    with_default("cluster_size", Kind::Size, "65536", "qcow2 cluster size"),
    with_default("extended_l2", Kind::Switch, "off", "Extended L2 tables"),
    def("preallocation", Kind::Text, "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    with_default("compression_type", Kind::Text, "zlib", "Compression method used for image cluster compression"),
    SIZE,
    COMPAT,
    BACKING_FILE,
    BACKING_FMT,
    DATA_FILE,
    DATA_FILE_RAW,
    Def { default: "off", ..LAZY_REFCOUNTS },
    Def { default: "16", ..REFCOUNT_BITS },
];

const VMDK: &[Def] = &[
    SIZE,
    def(
        "adapter_type",
        Kind::Text,
        "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    ),
    BACKING_FILE,
    def("backing_fmt", Kind::Text, "Must be 'vmdk' if present"),
    with_default("compat6", Kind::Switch, "off", "VMDK version 6 image"),
    with_default("hwversion", Kind::Text, "undefined", "VMDK hardware version"),
    def("toolsversion", Kind::Text, "VMware guest tools version"),
    def(
        "subformat",
        Kind::Text,
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | twoGbMaxExtentSparse | \
         twoGbMaxExtentFlat | streamOptimized} ",
    ),
    def("zeroed_grain", Kind::Switch, "Enable efficient zero writes using the zeroed-grain GTE feature"),
];

const VDI: &[Def] = &[SIZE, with_default("static", Kind::Switch, "off", "VDI static (pre-allocated) image")];

const VPC: &[Def] = &[
    SIZE,
    def(
        "subformat",
        Kind::Text,
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    ),
    def(
        "force_size",
        Kind::Switch,
        "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based \
         calculation",
    ),
];

const VHDX: &[Def] = &[
    def("size", Kind::Size, "Virtual disk size; max of 64TB."),
    with_default("log_size", Kind::Size, "1048576", "Log size; min 1MB."),
    with_default(
        "block_size",
        Kind::Size,
        "0",
        "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
    ),
    def("subformat", Kind::Text, "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'."),
    def(
        "block_state_zero",
        Kind::Switch,
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using \
         'qemu-img convert' with subformat=dynamic.",
    ),
];

const LUKS: &[Def] = &[
    SIZE,
    def("key-secret", Kind::Text, "ID of the secret that provides the keyslot passphrase"),
    def("cipher-alg", Kind::Text, "Name of encryption cipher algorithm"),
    def("cipher-mode", Kind::Text, "Name of encryption cipher mode"),
    def("ivgen-alg", Kind::Text, "Name of IV generator algorithm"),
    def("ivgen-hash-alg", Kind::Text, "Name of IV generator hash algorithm"),
    def("hash-alg", Kind::Text, "Name of encryption hash algorithm"),
    ITER_TIME,
    def("detached-header", Kind::Switch, "Create a detached LUKS header"),
];

/// What every file of the host takes.
const FILE: &[Def] = &[
    def("nocow", Kind::Switch, "Turn off copy-on-write (valid only on btrfs)"),
    def("preallocation", Kind::Text, "Preallocation mode (allowed values: off, falloc, full)"),
    def("extent_size_hint", Kind::Size, "Extent size hint for the image file, 0 to disable"),
];

/// Formats that have names here.
const FORMATS: [&str; 7] = ["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "luks"];

/// The name of a format that has names here.
pub fn known(format: &str) -> Option<&'static str> {
    FORMATS.into_iter().find(|name| *name == format)
}

/// The names of a format; `None` for one that is not created here.
pub fn names_of(format: &str) -> Option<Vec<&'static Def>> {
    let own = match format {
        "raw" => &[SIZE],
        "qcow2" => QCOW2,
        "vmdk" => VMDK,
        "vdi" => VDI,
        "vpc" => VPC,
        "vhdx" => VHDX,
        "luks" => LUKS,
        _ => return None,
    };
    let file = FILE.iter().filter(|of_file| own.iter().all(|of_format| of_format.name != of_file.name));
    Some(own.iter().chain(file).collect())
}

/// Whether a name is one of the file below the format, and not of the format itself.
pub fn is_of_file(format: &str, def: &Def) -> bool {
    FILE.iter().any(|of_file| of_file.name == def.name) && !(format == "qcow2" && def.name == "preallocation")
}

/// What `amend` changes in the key slots of a raw LUKS image.
const LUKS_AMEND: &[Def] = &[KEY_STATE, NEW_SECRET, OLD_SECRET, KEY_SLOT, ITER_TIME];

const KEY_STATE: Def = def("state", Kind::Text, "Select new state of affected keyslots (active/inactive)");
const NEW_SECRET: Def =
    def("new-secret", Kind::Text, "New secret to set in the matching keyslots. Empty string to erase");
const OLD_SECRET: Def = def("old-secret", Kind::Text, "Select all keyslots that match this password");
const KEY_SLOT: Def = def("keyslot", Kind::Number, "Select a single keyslot to modify explicitly");

/// What `amend` changes in a qcow2 image.
const QCOW2_AMEND: &[Def] = &[
    Def { name: "encrypt.state", ..KEY_STATE },
    Def { name: "encrypt.new-secret", ..NEW_SECRET },
    Def { name: "encrypt.old-secret", ..OLD_SECRET },
    Def { name: "encrypt.keyslot", ..KEY_SLOT },
    ENCRYPT_ITER_TIME,
    SIZE,
    COMPAT,
    BACKING_FILE,
    BACKING_FMT,
    DATA_FILE,
    DATA_FILE_RAW,
    LAZY_REFCOUNTS,
    REFCOUNT_BITS,
];

/// The names `amend` takes for a format; `None` where nothing can be amended.
pub fn amendable(format: &str) -> Option<Vec<&'static Def>> {
    match format {
        "qcow2" => Some(QCOW2_AMEND.iter().collect()),
        "luks" => Some(LUKS_AMEND.iter().collect()),
        _ => None,
    }
}

/// The values that were given.
#[derive(Debug, Default)]
pub struct OptList {
    given: Vec<(&'static Def, Value)>,
}

/// One of them, read by its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Text.
    Text(String),
    /// A switch.
    Switch(bool),
    /// A size or number.
    Number(u64),
}

/// Whether a list asks for help instead.
pub fn wants_help(lists: &[&str]) -> bool {
    lists.iter().flat_map(|list| block::spec::split_commas(list)).any(|item| item == "help" || item == "?")
}

/// The text of `-o help`.
pub fn help(heading: &str, defs: &[&Def]) -> String {
    let mut sorted: Vec<&&Def> = defs.iter().collect();
    sorted.sort_by_key(|def| def.name);
    let mut out = format!("{heading}:\n");
    for def in sorted {
        let kind = match def.kind {
            Kind::Text => "<str>",
            Kind::Switch => "<bool (on/off)>",
            Kind::Size => "<size>",
            Kind::Number => "<num>",
        };
        out += &format!("  {:<22} - {}\n", format!("{}={kind}", def.name), def.help);
    }
    out
}

impl OptList {
    /// Reads lists; of a name given twice the last value holds. `subject` is named in errors.
    pub fn parse(subject: &str, defs: &[&'static Def], lists: &[&str]) -> Result<OptList, ImgError> {
        let mut read = OptList::default();
        for item in lists.iter().flat_map(|list| block::spec::split_commas(list)) {
            let (name, value) = match item.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (item.as_str(), None),
            };
            let known = |name: &str| defs.iter().copied().find(|def| def.name == name);
            let (def, value) = match (known(name), value) {
                (Some(def), value) => (def, value.map(str::to_owned)),
                (None, None) => match name.strip_prefix("no").and_then(known).filter(|def| def.kind == Kind::Switch) {
                    Some(def) => (def, Some("off".to_owned())),
                    None => return Err(ImgError::Parameter { subject: subject.to_owned(), name: name.to_owned() }),
                },
                (None, Some(_)) => {
                    return Err(ImgError::Parameter { subject: subject.to_owned(), name: name.to_owned() });
                }
            };
            // A bare name is a switch that is on; for another kind it is as wrong as any other word.
            let value = read_value(subject, def, value.as_deref().unwrap_or("on"))?;
            read.set(def, value);
        }
        Ok(read)
    }

    fn set(&mut self, def: &'static Def, value: Value) {
        self.given.retain(|(there, _)| there.name != def.name);
        self.given.push((def, value));
    }

    /// Puts a text in, as another option of the command line gave it.
    pub fn put(&mut self, defs: &[&'static Def], name: &str, value: Value) -> bool {
        match defs.iter().find(|def| def.name == name) {
            Some(def) => {
                self.set(def, value);
                true
            }
            None => false,
        }
    }

    fn value(&self, name: &str) -> Option<&Value> {
        self.given.iter().find(|(def, _)| def.name == name).map(|(_, value)| value)
    }
    /// Whether it was given.
    pub fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }
    /// A text that was given.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.value(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }
    /// A switch that was given.
    pub fn switch(&self, name: &str) -> Option<bool> {
        match self.value(name) {
            Some(Value::Switch(on)) => Some(*on),
            _ => None,
        }
    }
    /// A size or number that was given.
    pub fn number(&self, name: &str) -> Option<u64> {
        match self.value(name) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }
    /// Names given, for those who must refuse some.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.given.iter().map(|(def, _)| def.name)
    }

    /// All values in the order of the format's table, defaults among them: `a=1 b=2`.
    pub fn echo(&self, defs: &[&'static Def]) -> String {
        let shown = defs.iter().filter_map(|def| {
            let value = match self.value(def.name) {
                // As it would have to be written in a list.
                Some(Value::Text(text)) => text.replace(',', ",,"),
                Some(Value::Switch(on)) => if *on { "on" } else { "off" }.to_owned(),
                Some(Value::Number(number)) => number.to_string(),
                None if def.default.is_empty() => return None,
                None => def.default.to_owned(),
            };
            Some(format!("{}={value}", def.name))
        });
        shown.collect::<Vec<_>>().join(" ")
    }
}

fn read_value(subject: &str, def: &'static Def, value: &str) -> Result<Value, ImgError> {
    let subject = || subject.to_owned();
    Ok(match def.kind {
        Kind::Text => Value::Text(value.to_owned()),
        Kind::Switch => match value {
            "on" => Value::Switch(true),
            "off" => Value::Switch(false),
            _ => return Err(ImgError::ParameterSwitch { subject: subject(), name: def.name }),
        },
        Kind::Size => match size::parse(value) {
            Ok(bytes) => Value::Number(bytes),
            Err(size::SizeError::Range) => {
                return Err(ImgError::ParameterRange { subject: subject(), name: def.name, found: value.to_owned() });
            }
            Err(size::SizeError::Text) => {
                return Err(ImgError::ParameterSize { subject: subject(), name: def.name });
            }
        },
        Kind::Number => match value.parse() {
            Ok(number) => Value::Number(number),
            Err(_) => return Err(ImgError::ParameterNumber { subject: subject(), name: def.name }),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echoed(format: &str, lists: &[&str]) -> Result<String, String> {
        let defs = names_of(format).unwrap();
        OptList::parse("x", &defs, lists).map(|list| list.echo(&defs)).map_err(|error| error.to_string())
    }

    #[test]
    fn lists_are_merged_and_echoed_in_qemu_img_s_order() {
        for (format, lists, want) in [
            ("raw", &["size=1k"][..], "size=1024"),
            (
                "raw",
                &["extent_size_hint=1M,preallocation=off", "nocow"],
                "nocow=on preallocation=off extent_size_hint=1048576",
            ),
            (
                "qcow2",
                &["cluster_size=4k,size=2M", "compat=0.10,size=1M"],
                "cluster_size=4096 extended_l2=off compression_type=zlib size=1048576 compat=0.10 lazy_refcounts=off \
                 refcount_bits=16",
            ),
            (
                "qcow2",
                &["backing_file=a,,b,lazy_refcounts,noextended_l2"],
                "cluster_size=65536 extended_l2=off compression_type=zlib backing_file=a,,b lazy_refcounts=on \
                 refcount_bits=16",
            ),
            ("vdi", &["preallocation=off"], "static=off preallocation=off"),
            ("vmdk", &["size=0x200"], "size=512 compat6=off hwversion=undefined"),
        ] {
            assert_eq!(echoed(format, lists).as_deref(), Ok(want), "{format} {lists:?}");
        }
    }

    #[test]
    fn wrong_values_are_named() {
        for (list, want) in [
            ("foo=1", "x: Invalid parameter 'foo'"),
            ("foo", "x: Invalid parameter 'foo'"),
            ("size", "x: Parameter 'size' expects a non-negative number below 2^64"),
            ("cluster_size=abc", "x: Parameter 'cluster_size' expects a non-negative number below 2^64"),
            ("lazy_refcounts=maybe", "x: Parameter 'lazy_refcounts' expects 'on' or 'off'"),
            ("refcount_bits=4k", "x: Parameter 'refcount_bits' expects a number"),
            ("cluster_size=-1", "x: Value '-1' is out of range for parameter 'cluster_size'"),
            ("size=17E", "x: Value '17E' is out of range for parameter 'size'"),
        ] {
            let said = echoed("qcow2", &[list]).unwrap_err();
            assert_eq!(said.lines().next(), Some(want), "{list}");
        }
    }
}
