//! What a define makes of a document, against golden files; and what it refuses, in libvirt's words.

use std::fs;
use std::path::Path;

use xml::{
    DefineContext, DomainDefinition, DomainXmlError, LifecycleAction, LifecycleEvent, LiveDetails, LivePty, VcpuCount,
};

fn define(document: &str) -> Result<DomainDefinition, DomainXmlError> {
    let mut random = || [0x11, 0x22, 0x33, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
    DomainDefinition::define(
        document.as_bytes(),
        &mut DefineContext { emulator: "/usr/bin/vireo-vmm", random: &mut random },
    )
}

fn golden(name: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/define").join(name);
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, actual).unwrap();
    }
    assert_eq!(actual, fs::read_to_string(&path).unwrap_or_default(), "{name} (UPDATE=1 rewrites it)");
}

fn input(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/define").join(name)).unwrap()
}

#[test]
fn documents_come_back_in_libvirts_shape() {
    for name in ["minimal", "rich"] {
        let defined = define(&input(&format!("{name}.in.xml"))).unwrap();
        golden(&format!("{name}.out.xml"), &defined.to_xml());
        // What was defined once is not changed by being defined again, or loaded.
        assert_eq!(define(&defined.to_xml()).unwrap(), defined, "{name}");
        assert_eq!(DomainDefinition::load(defined.to_xml().as_bytes()).unwrap(), defined, "{name}");
    }
}

#[test]
fn a_running_domain_shows_what_its_run_added() {
    let details = LiveDetails {
        id: 3,
        ptys: vec![LivePty { alias: "serial0".into(), path: "/dev/pts/4".into() }],
        backing: vec![vec![("qcow2".into(), "/mid.qcow2".into()), ("raw".into(), "/base.raw".into())]],
    };
    golden("minimal.live.xml", &define(&input("minimal.in.xml")).unwrap().live(&details).to_xml());
    golden("rich.live.xml", &define(&input("rich.in.xml")).unwrap().live(&details).to_xml());
}

const BASE: &str = "<domain type='qemu'><name>dup</name><uuid>aaaaaaaa-1111-4222-8333-000000000001</uuid>\
    <memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>\
    <features><acpi/><apic/></features><devices><console type='pty'/></devices></domain>";

#[test]
fn what_is_wrong_is_said_as_libvirt_says_it() {
    for (from, to, expected) in [
        ("<name>dup</name>", "", "missing name information"),
        ("<name>dup", "<name>", "missing name information"),
        ("<name>dup", "<name>a/b", "XML error: name a/b cannot contain '/'"),
        ("type='qemu'", "type='nosuch'", "unsupported configuration: invalid domain type nosuch"),
        ("x86_64", "nosuch", "unsupported configuration: Unknown architecture nosuch"),
        ("<vcpu>1", "<vcpu>x", "XML error: maximum vcpus count must be an integer"),
        ("<uuid>aaaaaaaa-1111-4222-8333-000000000001", "<uuid>zz", "internal error: malformed uuid element"),
        (
            "<memory unit='MiB'>64</memory>",
            "",
            "XML error: Memory size must be specified via <memory> or in the <numa> configuration",
        ),
        (">64<", ">banana<", "XML error: Invalid value 'banana' for element or attribute './memory[1]'"),
        ("'MiB'", "'parsec'", "invalid argument: unknown suffix 'parsec'"),
        (
            "<console type='pty'/>",
            "<disk type='file'><source file='/x'/></disk>",
            "missing target information for device /x",
        ),
        (
            "<console type='pty'/>",
            "<disk type='file'><source file='/x'/><target dev='vda' bus='virtio'/></disk>\
             <disk type='file'><source file='/y'/><target dev='vda' bus='virtio'/></disk>",
            "XML error: target 'vda' duplicated for disk sources '/x' and '/y'",
        ),
        ("domain", "network", "XML error: expecting root element of 'domain', not 'network'"),
        (">hvm<", ">linux<", "unknown OS type linux"),
        (
            "<console type='pty'/>",
            "<interface type='user'><mac address='53:54:00:00:00:01'/></interface>",
            "XML error: expected unicast mac address, found multicast '53:54:00:00:00:01'",
        ),
    ] {
        let document = BASE.replace(from, to);
        assert_ne!(document, BASE, "{from}");
        assert_eq!(define(&document).map(|_| ()).unwrap_err().to_string(), expected);
    }
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    for (element, named) in [
        ("<hostdev mode='subsystem' type='pci'/>", "<hostdev>"),
        ("<filesystem type='mount'/>", "<filesystem>"),
        ("<graphics type='vnc'/>", "<graphics>"),
        ("<channel type='unix'/>", "<channel>"),
        ("<disk type='file' device='cdrom'><target dev='vdz'/></disk>", "disk device 'cdrom'"),
        ("<disk type='file'><source file='/x'/><target dev='sda' bus='sata'/></disk>", "disk bus 'sata'"),
        ("<disk type='file'><driver type='vmdk'/><source file='/x'/><target dev='vda'/></disk>", "image format 'vmdk'"),
        ("<disk type='file'><target dev='vda'/></disk>", "disk without a source 'vda'"),
        ("<serial type='tcp'/>", "character device type 'tcp'"),
        ("</devices><launchSecurity type='sev'/><devices>", "<launchSecurity>"),
        ("</devices><cpu><numa/></cpu><devices>", "<numa>"),
        ("</devices><cpu mode='custom'><model>qemu64</model></cpu><devices>", "CPU model 'qemu64'"),
    ] {
        let document = BASE.replace("<devices>", &format!("<devices>{element}"));
        let defined = define(&document).unwrap();
        let error = defined.check_buildable().unwrap_err().to_string();
        assert!(error.starts_with("unsupported configuration: ") && error.contains(named), "{element}: {error}");
    }
    let machine = BASE.replace("q35", "pc-i440fx-10.0");
    let error = define(&machine).unwrap().check_buildable().unwrap_err().to_string();
    assert!(error.contains("machine type 'pc-i440fx-10.0'"), "{error}");
    assert_eq!(define(BASE).unwrap().check_buildable(), Ok(()));
}

#[test]
fn a_typing_error_is_caught_where_validation_is_asked_for() {
    let defined = define(&BASE.replace("vcpu>", "vcqu>")).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        defined.check_schema().unwrap_err().to_string(),
        "XML document failed to validate against schema: Extra element vcqu in interleave of domain"
    );
    assert_eq!(define(BASE).unwrap().check_schema(), Ok(()));
}

#[test]
fn edits_show_in_the_document() {
    let mut domain = define(BASE).unwrap();
    domain.set_max_memory_kib(32768).unwrap();
    domain.set_vcpus(VcpuCount::Maximum, 4).unwrap();
    domain.set_text_of("title", Some("a title")).unwrap();
    domain.set_lifecycle(LifecycleEvent::Reboot, LifecycleAction::Destroy).unwrap();
    domain.rename("new").unwrap();
    assert_eq!(domain.set_metadata("http://x.example/1", "k", Some("<a><b c='1'/>t</a>")), Ok(false));
    assert_eq!(domain.metadata("http://x.example/1").unwrap(), "<a><b c=\"1\"/>t</a>");
    let document = domain.to_xml();
    for expected in [
        "  <name>new</name>\n",
        "  <title>a title</title>\n",
        "  <metadata>\n    <k:a xmlns:k=\"http://x.example/1\"><k:b c=\"1\"/>t</k:a>\n  </metadata>\n",
        "  <memory unit='KiB'>32768</memory>\n  <currentMemory unit='KiB'>32768</currentMemory>\n",
        "  <vcpu placement='static' current='1'>4</vcpu>\n",
        "  <on_reboot>destroy</on_reboot>\n",
    ] {
        assert!(document.contains(expected), "{expected} in {document}");
    }
    assert_eq!(DomainDefinition::load(document.as_bytes()).unwrap(), domain);
    assert_eq!(domain.set_metadata("http://x.example/1", "k", None), Ok(true));
    domain.set_text_of("title", None).unwrap();
    assert!(!domain.to_xml().contains("metadata") && !domain.to_xml().contains("title"));
    assert!(domain.set_text_of("title", Some("a\nb")).is_err());
    assert!(domain.rename("a/b").is_err());
    assert_eq!(domain.config().name, "new");
}

/// Defines mutations of the sample documents. Whatever comes in, nothing panics; what is accepted is stable: defining or
/// loading it again changes nothing.
#[test]
fn mutated_documents_are_refused_or_stable() {
    let samples = [input("minimal.in.xml"), input("rich.in.xml"), BASE.to_owned()];
    let words =
        ["<", ">", "/>", "'", "&lt;", "&#0;", "<!--", "]]>", "<devices>", "</domain>", "type='x'", "0", "-1", "é"];
    let mut seed = 0x853c_49e6_748f_ea9b_u64;
    let mut next = move |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below.max(1)
    };
    let mut accepted = 0;
    for round in 0..60_000 {
        let mut bytes = samples[round % samples.len()].clone().into_bytes();
        for _ in 0..1 + next(3) {
            let (from, to) = (next(bytes.len()), next(bytes.len()));
            match next(5) {
                0 => bytes[from] = next(256) as u8,
                1 => drop(bytes.drain(from.min(to)..from.max(to).min(from.min(to) + 40))),
                2 => drop(bytes.splice(from..from, words[next(words.len())].bytes())),
                3 => bytes.truncate(from),
                _ => {
                    let piece: Vec<u8> = bytes[from.min(to)..from.max(to).min(from.min(to) + 80)].to_vec();
                    drop(bytes.splice(from..from, piece));
                }
            }
            if bytes.is_empty() {
                bytes.push(b'<');
            }
        }
        let mut random = || [7; 16];
        let mut context = DefineContext { emulator: "/usr/bin/vireo-vmm", random: &mut random };
        let Ok(defined) = DomainDefinition::define(&bytes, &mut context) else { continue };
        accepted += 1;
        let text = defined.to_xml();
        let again = define(&text).unwrap_or_else(|error| panic!("round {round}: {error}\n{text}"));
        assert_eq!(again.to_xml(), text, "round {round}: {}", String::from_utf8_lossy(&bytes));
        let _ = (defined.check_buildable(), defined.check_schema(), defined.metadata("urn:k"));
    }
    assert!(accepted > 500, "only {accepted} were accepted: the mutations are too wild to test what follows");
}
