//! NBD with the programs of others: qemu-img, qemu-io, qemu-nbd, nbdinfo, nbdcopy and nbdkit.

mod nbd_support;
mod support;

use std::path::Path;

use block::nbd::{ServeOptions, list_exports};
use block::spec::{NbdAddress, NbdSpec};
use block::{FileBackend, Format, ReadBufs, WriteBufs};
use nbd_support::{Peer, Served, connect, new_image, output, run};
use support::Rng;

const SIZE: u64 = 8 << 20;

fn options() -> ServeOptions<'static> {
    ServeOptions { max_clients: 8, name: "e x".into(), description: "for people".into(), ..ServeOptions::default() }
}

/// A disk with data, zeroes that take space, and holes.
fn content(dir: &Path) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    let mut rng = Rng(7);
    for range in [0..100_000, 1 << 20..(1 << 20) + 4096, 5_000_000..7_000_000] {
        bytes[range].iter_mut().for_each(|byte| *byte = rng.next() as u8);
    }
    std::fs::write(dir.join("content"), &bytes).unwrap();
    bytes
}

#[test]
fn qemu_s_clients_read_and_write_an_export() {
    for format in [Format::Raw, Format::Qcow2] {
        let dir = tempfile::tempdir().unwrap();
        let bytes = content(dir.path());
        let served = Served::new(new_image(dir.path(), format, SIZE), options());
        let (uri, from) = (served.uri().replace(' ', "%20"), dir.path().join("content").display().to_string());
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &from, &uri]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &uri]);
        let mut found = vec![0; bytes.len()];
        served.disk.read(0, &mut found).unwrap();
        assert!(found == bytes, "{format}");
        let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let holes = map.as_array().unwrap().iter().filter(|run| run["zero"] == true && run["data"] == false);
        assert!(holes.map(|run| run["length"].as_u64().unwrap()).sum::<u64>() > SIZE / 2, "{map}");
        let said = run(
            "qemu-io",
            &[
                "-f",
                "raw",
                "-c",
                "write -P 5 12345 54321",
                "-c",
                "write -z -u 20k 12k",
                "-c",
                "write -z 4M 64k",
                "-c",
                "read -P 5 12345 1000",
                "-c",
                "read -P 0 20k 12k",
                "-c",
                "discard 1M 1M",
                "-c",
                "flush",
                "-c",
                "write -f -P 6 4M 512",
                "-c",
                "read -P 6 4M 512",
                "-c",
                "read -P 0 4195k 60k",
                &uri,
            ],
        );
        assert!(!said.contains("failed"), "{said}");
        let outside = output("qemu-img", &["info", &uri.replace("e%20x", "other")]);
        assert!(String::from_utf8_lossy(&outside.stderr).contains("Requested export not available"));
        let listed = run("qemu-nbd", &["-L", "-k", &served.socket().display().to_string()]);
        let want = "export: 'e x'\n  description: for people\n  size:  8388608\n  flags: 0xded ";
        assert!(listed.contains(want) && listed.contains("   base:allocation\n"), "{listed}");
        served.end().unwrap();
    }
}

#[test]
fn libnbd_s_clients_read_and_write_an_export() {
    for format in [Format::Raw, Format::Qcow2] {
        let dir = tempfile::tempdir().unwrap();
        let bytes = content(dir.path());
        let served = Served::new(new_image(dir.path(), format, SIZE), options());
        let (uri, from) = (served.uri().replace(' ', "%20"), dir.path().join("content").display().to_string());
        run("nbdcopy", &["--flush", &from, &uri]);
        let mut found = vec![0; bytes.len()];
        served.disk.read(0, &mut found).unwrap();
        assert!(found == bytes, "{format}");
        let to = dir.path().join("back").display().to_string();
        run("nbdcopy", &[&uri, &to]);
        assert!(std::fs::read(&to).unwrap() == bytes, "{format}");
        let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
        let export = &info["exports"][0];
        for (field, want) in [
            ("export-name", "e x".into()),
            ("description", "for people".into()),
            ("export-size", SIZE.into()),
            ("is_read_only", false.into()),
            ("can_fua", true.into()),
            ("can_fast_zero", true.into()),
            ("can_multi_conn", true.into()),
            ("can_df", true.into()),
            ("block_minimum", serde_json::Value::from(1)),
        ] {
            let found = if field == "block_minimum" { &export["block_size_minimum"] } else { &export[field] };
            assert_eq!(*found, want, "{field}: {info}");
        }
        assert_eq!(info["structured"], true, "{info}");
        let map = run("nbdinfo", &["--map", &uri]);
        assert!(map.contains("hole,zero") && map.contains("data"), "{map}");
        let list = run("nbdinfo", &["--list", &uri]);
        assert!(list.contains("export=\"e x\""), "{list}");
    }
}

/// Writes, reads and looks at an export of a server by means of the client.
fn exercise(socket: &Path, export: &str, can_tell_holes: bool) {
    let file = connect(socket, export).unwrap();
    let size = file.len_bytes().unwrap();
    assert!(size >= SIZE, "{size}");
    let mut model = vec![0; SIZE as usize];
    let mut rng = Rng(11);
    for _ in 0..60 {
        let offset = rng.below(SIZE - 1);
        let bytes = (rng.below(300_000) + 1).min(SIZE - offset);
        let range = offset as usize..(offset + bytes) as usize;
        match rng.below(4) {
            0 => {
                file.write_zeroes(offset, bytes, rng.below(2) == 0).unwrap();
                model[range].fill(0);
            }
            1 => file.sync_data().unwrap(),
            _ => {
                let data: Vec<u8> = (0..bytes).map(|_| rng.next() as u8).collect();
                file.write_at(offset, &WriteBufs::from_slice(&data)).unwrap();
                model[range].copy_from_slice(&data);
            }
        }
    }
    let mut found = vec![0xee; SIZE as usize];
    file.read_at(0, &ReadBufs::from_slice(&mut found)).unwrap();
    assert!(found == model);
    file.punch_hole(0, SIZE).unwrap();
    file.write_zeroes(0, SIZE, true).unwrap();
    file.write_at(1 << 20, &WriteBufs::from_slice(&[9; 65536])).unwrap();
    let (mut at, mut data_bytes) = (0, 0);
    while at < SIZE {
        let (run, is_data) = file.extent(at, SIZE - at).unwrap();
        data_bytes += if is_data { run } else { 0 };
        at += run;
    }
    let want = if can_tell_holes { 65536..1 << 20 } else { SIZE..SIZE + 1 };
    assert!(want.contains(&data_bytes), "{data_bytes}");
    file.read_at(0, &ReadBufs::from_slice(&mut found)).unwrap();
    assert!(found[..1 << 20].iter().chain(&found[(1 << 20) + 65536..]).all(|b| *b == 0));
}

#[test]
fn the_client_uses_qemu_nbd() {
    for (format, name) in [("raw", ""), ("qcow2", "ex/port")] {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image").display().to_string();
        run("qemu-img", &["create", "-q", "-f", format, &image, "8M"]);
        let args = [
            "--fork",
            "--pid-file=PID",
            "-t",
            "-e2",
            "-k",
            "SOCKET",
            "-f",
            format,
            "-x",
            name,
            "--discard=unmap",
            "DIR/image",
        ];
        let peer = Peer::start(dir, "qemu-nbd", &args);
        exercise(&peer.socket(), name, true);
        let spec = NbdSpec::new(NbdAddress::Unix(peer.socket()), "");
        let exports = list_exports(&spec, None).unwrap();
        assert_eq!((exports.len(), exports[0].name.as_str()), (1, name));
        assert_eq!(
            (exports[0].size_and_flags.unwrap().0, &exports[0].contexts),
            (SIZE, &vec!["base:allocation".to_owned()])
        );
        let file = connect(&peer.socket(), name).unwrap();
        peer.kill();
        let gone = (0..1000).find_map(|_| file.read_at(0, &ReadBufs::from_slice(&mut [0; 512])).err()).unwrap();
        assert!(gone.to_string().contains("the connection is lost"), "{gone}");
    }
}

#[test]
fn the_client_uses_nbdkit() {
    for (options, can_tell_holes) in [
        (&["memory", "8M"][..], true),
        (&["--no-sr", "memory", "8M"], false),
        // Without fixed newstyle: the export is named the old way. Then without leaving out zeroes.
        (&["--mask-handshake=2", "memory", "8M"], false),
        (&["--mask-handshake=1", "memory", "8M"], true),
        (&["--mask-handshake=0", "memory", "8M"], false),
        (
            &[
                "--filter=blocksize-policy",
                "memory",
                "8M",
                "blocksize-minimum=4096",
                "blocksize-preferred=8192",
                "blocksize-maximum=64k",
                "blocksize-error-policy=error",
            ],
            true,
        ),
        // Zeroes go as data.
        (&["--filter=nozero", "--filter=fua", "memory", "8M"], true),
    ] {
        let args = [&["-U", "SOCKET", "-P", "PID"][..], options].concat();
        let peer = Peer::start(tempfile::tempdir().unwrap(), "nbdkit", &args);
        eprintln!("{options:?}");
        exercise(&peer.socket(), "", can_tell_holes);
    }
}

#[test]
fn errors_of_a_server_are_told() {
    let args = [
        "-U",
        "SOCKET",
        "-P",
        "PID",
        "--filter=error",
        "memory",
        "8M",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
        "error-pread=EIO",
        "error-pread-rate=100%",
    ];
    let peer = Peer::start(tempfile::tempdir().unwrap(), "nbdkit", &args);
    let file = connect(&peer.socket(), "").unwrap();
    let error = file.write_at(0, &WriteBufs::from_slice(&[1; 512])).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(28), "{error}");
    let error = file.read_at(0, &ReadBufs::from_slice(&mut [0; 512])).unwrap_err();
    assert!(error.to_string().contains("the server refused the request (error 5)"), "{error}");
    // The connection goes on.
    file.sync_data().unwrap();
}
