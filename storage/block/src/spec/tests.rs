//! Names and what they mean; the refusals are the words of qemu-img 10.0.2 for the same names.

use std::ffi::OsStr;

use super::*;

fn named(name: &str) -> Result<ImageSpec, SpecError> {
    match name.strip_prefix("opts ") {
        Some(options) => ImageSpec::parse_options(options),
        None => ImageSpec::parse(OsStr::new(name)),
    }
}

fn path(name: &str, driver: Option<Format>) -> ImageSpec {
    ImageSpec::path(name, driver)
}

fn slice(below: &str, offset: u64, size: Option<u64>) -> FileSpec {
    FileSpec::Slice { below: Box::new(FileSpec::Path(below.into())), offset, size }
}

fn tcp(host: &str, port: u16, export: &str) -> ImageSpec {
    let address = NbdAddress::Tcp { host: host.to_owned(), port };
    ImageSpec::over(FileSpec::Nbd(NbdSpec::new(address, export)), None)
}

fn unix(socket: &str, export: &str, driver: Option<Format>) -> ImageSpec {
    let address = NbdAddress::Unix(socket.into());
    ImageSpec::over(FileSpec::Nbd(NbdSpec::new(address, export)), driver)
}

#[test]
fn every_spelling_gives_the_same_image() {
    let qcow2 = Some(Format::Qcow2);
    let raw = Some(Format::Raw);
    let flat = path("b.qcow2", qcow2);
    for (name, want) in [
        ("a.img", path("a.img", None)),
        ("./a:b", path("./a:b", None)),
        ("/x/a:b", path("/x/a:b", None)),
        ("-a\n", path("-a\n", None)),
        ("file:a.img", path("a.img", None)),
        ("file:/x/a.img", path("/x/a.img", None)),
        (r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"b.qcow2"}}"#, flat.clone()),
        (r#"json:{"driver":"qcow2","file.filename":"b.qcow2"}"#, flat.clone()),
        (r#"json:{"driver":"qcow2","file":{"driver":"file"},"file.filename":"b.qcow2"}"#, flat.clone()),
        (r#"json:{"file.driver":"file","file":{"filename":"b.qcow2"},"driver":"qcow2"}"#, flat.clone()),
        ("opts driver=qcow2,file.driver=file,file.filename=b.qcow2", flat.clone()),
        ("opts driver=qcow2,file.filename=b,,c", path("b,c", qcow2)),
        ("opts file.filename=b.qcow2", path("b.qcow2", None)),
        (r#"json:{"driver":"file","filename":"r.img"}"#, path("r.img", raw)),
        (
            r#"json:{"driver":"qcow2","file.filename":"b.qcow2","backing":null}"#,
            ImageSpec { backing: BackingSpec::None, ..flat.clone() },
        ),
        (
            r#"json:{"driver":"qcow2","file.filename":"b.qcow2","backing":{"driver":"raw","file.filename":"r"}}"#,
            ImageSpec { backing: BackingSpec::Image(Box::new(path("r", raw))), ..flat.clone() },
        ),
        (
            r#"json:{"file":{"driver":"raw","offset":512,"size":1024,"file":{"filename":"r"}}}"#,
            ImageSpec::over(slice("r", 512, Some(1024)), None),
        ),
        (
            r#"json:{"driver":"raw","offset":"1k","file":{"filename":"r"}}"#,
            ImageSpec::over(slice("r", 1024, None), raw),
        ),
        (
            "opts driver=qcow2,file.filename=b.qcow2,encrypt.key-secret=sec0,encrypt.format=luks,file.locking=off",
            ImageSpec {
                key_secret: Some("sec0".into()),
                options: vec![("encrypt.format".into(), "luks".into())],
                ..flat.clone()
            },
        ),
        ("opts driver=qcow2,file.filename=b.qcow2,read-only=on", ImageSpec { read_only: Some(true), ..flat.clone() }),
        ("opts driver=qcow2,file.filename=b.qcow2,noread-only", ImageSpec { read_only: Some(false), ..flat.clone() }),
        ("nbd://localhost", tcp("localhost", 10809, "")),
        ("nbd://[::1]:1/a%20b", tcp("::1", 1, "a b")),
        ("nbd+tcp://h:2/x", tcp("h", 2, "x")),
        ("nbd:h:3:exportname=e:f", tcp("h", 3, "e:f")),
        ("nbd:unix:/s:exportname=e", unix("/s", "e", None)),
        ("nbd+unix:///e?socket=/s", unix("/s", "e", None)),
        ("nbd+unix:///?socket=/s%20t", unix("/s t", "", None)),
        (
            r#"json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"unix","path":"/s"},"export":"e"}}"#,
            unix("/s", "e", qcow2),
        ),
        ("opts driver=raw,file.driver=nbd,file.path=/s", unix("/s", "", raw)),
        (
            "blkdebug:rules.conf:a.img",
            ImageSpec::over(
                FileSpec::Blkdebug {
                    rules: Some("rules.conf".into()),
                    own: BlkdebugSpec::default(),
                    below: Box::new(FileSpec::Path("a.img".into())),
                },
                None,
            ),
        ),
        (
            r#"json:{"driver":"raw","file":{"driver":"qcow2","file.filename":"b.qcow2"}}"#,
            ImageSpec::over(FileSpec::Image(Box::new(flat.clone())), raw),
        ),
    ] {
        assert_eq!(named(name).as_ref(), Ok(&want), "{name}");
    }
}

#[test]
fn refusals_are_in_qemu_s_words() {
    for (name, want) in [
        ("", "The 'file' block driver requires a file name"),
        ("foo:bar", "Unknown protocol 'foo'"),
        ("https://h/x", "'https' is not supported here; copy the image to a local file, or serve it over NBD"),
        ("opts driver=foo,file.filename=a", "Unknown driver 'foo'"),
        ("opts driver=qcow2,file.driver=foo,file.filename=a", "Unknown driver 'foo'"),
        ("opts driver=qcow2", "A block device must be specified for \"file\""),
        ("opts a.qcow2", "Cannot find device='a.qcow2' nor node-name='a.qcow2'"),
        ("opts filename=a", "Must specify either driver or file"),
        ("opts driver=qcow2,file.filename=a,bogus=1", "Block format 'qcow2' does not support the option 'bogus'"),
        ("opts driver=qcow2,file.filename=a,file.bogus=1", "Block protocol 'file' doesn't support the option 'bogus'"),
        ("opts driver=qcow2,file.driver=file", "The 'file' block driver requires a file name"),
        ("opts driver=raw,read-only=foo,file.filename=r", "Parameter 'read-only' expects 'on' or 'off'"),
        (
            "opts driver=raw,offset=99999999999999999999,file.filename=r",
            "Value '99999999999999999999' is out of range for parameter 'offset'",
        ),
        (
            r#"json:{"driver":"raw","offset":-5,"file":{"filename":"r"}}"#,
            "Value '-5' is out of range for parameter 'offset'",
        ),
        (r#"json:{"driver":"raw","size":1000,"file":{"filename":"r"}}"#, "Specified size is not multiple of 512"),
        (r#"json:{"driver":"#, "Could not parse the JSON options: JSON parse error, premature EOI"),
        ("json:", "Could not parse the JSON options: Expecting a JSON value"),
        ("json:[]", "Invalid JSON object given"),
        (r#"json:{"driver":"qcow2","file":"n"}"#, "Cannot find device='n' nor node-name='n'"),
        (r#"json:{"driver":"nbd"}"#, "NBD server address missing"),
        (r#"json:{"driver":"nbd","server":{"type":"foo"}}"#, "Parameter 'type' does not accept value 'foo'"),
        ("opts driver=nbd,path=/s,open-timeout=x", "Parameter 'open-timeout' does not accept value 'x'"),
        ("opts driver=nbd,path=/s,reconnect-delay=-1", "Parameter 'reconnect-delay' does not accept value '-1'"),
        ("nbd:", "NBD server address missing"),
        ("nbd:localhost", "error parsing address 'localhost'"),
        ("nbd://h:99999", "No valid URL specified"),
        ("nbd+unix:///x", "No valid URL specified"),
        ("nbd+tcp://h/x?foo=bar", "No valid URL specified"),
    ] {
        assert_eq!(named(name).map_err(|e| e.to_string()), Err(want.to_owned()), "{name}");
    }
    assert!(matches!(named("opts driver=raw,offset=abc,file.filename=r"), Err(SpecError::Number { .. })));
}

#[test]
fn hostile_names_are_bounded() {
    let deep = format!("json:{}{}", r#"{"file":"#.repeat(5000), "}".repeat(5000));
    assert!(named(&deep).is_err());
    let nested = format!("json:{}1{}", r#"{"file":"#.repeat(100), "}".repeat(100));
    assert_eq!(named(&nested), Err(SpecError::TooDeep));
    // Nesting and dots count together: 10 levels of 32 names each would be read, one by one, and built.
    let both = format!("json:{}1{}", format!(r#"{{"{}":"#, ["a"; 32].join(".")).repeat(10), "}".repeat(10));
    assert_eq!(named(&both), Err(SpecError::TooDeep));
    let dotted = format!("opts {}filename=x", "file.".repeat(5000));
    assert_eq!(named(&dotted), Err(SpecError::TooDeep));
    assert_eq!(named(&"a".repeat(70_000)), Err(SpecError::TooLong { bytes: 70_000 }));
    assert_eq!(named(&format!("{}a", "blkdebug::".repeat(500))), Err(SpecError::TooDeep));
    for name in ["opts file=a,file.filename=b", r#"json:{"file":{"filename":"a"},"file":7}"#, "opts file.filename.x=a"]
    {
        assert!(named(name).is_err(), "{name}");
    }
}

#[test]
fn names_are_printed_as_short_as_they_can_be() {
    for (name, want) in [
        (r#"json:{"driver":"qcow2","file.filename":"b.qcow2","backing":null}"#, "b.qcow2"),
        ("nbd:unix:/s:exportname=e", "nbd+unix:///e?socket=/s"),
        ("nbd:h:3", "nbd://h:3"),
        (
            r#"json:{"driver":"raw","offset":512,"size":1024,"file.filename":"r"}"#,
            r#"json:{"driver": "raw", "file": {"driver": "file", "filename": "r"}, "offset": 512, "size": 1024}"#,
        ),
    ] {
        assert_eq!(named(name).unwrap().to_string(), want, "{name}");
    }
}

#[test]
fn an_nbd_export_has_a_context_and_times() {
    let address = NbdAddress::Unix("/s".into());
    let want = NbdSpec { context: Some("b".to_owned()), open_timeout_s: 5, ..NbdSpec::new(address, "") };
    for place in ["path=/s", "uri=nbd+unix://?socket=/s"] {
        let text = format!("opts driver=nbd,{place},x-dirty-bitmap=b,open-timeout=5,reconnect-delay=0");
        let found = named(&text).unwrap();
        assert_eq!(found, ImageSpec::over(FileSpec::Nbd(want.clone()), Some(Format::Raw)), "{text}");
    }
}
