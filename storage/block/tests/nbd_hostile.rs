//! NBD peers that break the rules, by table and by chance. Neither side panics or keeps what it was told to keep
//! without bound, a client gets an error in words, and a server goes on with others.

mod nbd_support;
mod support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use block::nbd::{CLIENTS_UNLIMITED, ServeOptions};
use block::{FileBackend, Format, ReadBufs, WriteBufs};
use nbd_support::{Served, connect, new_image};
use support::Rng;

const SIZE: u64 = 1 << 20;
/// Long after anything here is done.
const DEADLINE: Duration = Duration::from_secs(60);

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// `IHAVEOPT`, number, length, data.
fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

const GO: &str = "00000000 0000";
const SET_META: &str = "00000000 00000001 0000000f 626173653a616c6c6f636174696f6e";

fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let head = hex("25609513");
    [
        &head[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

fn served() -> (tempfile::TempDir, Served) {
    let dir = tempfile::tempdir().unwrap();
    let disk = new_image(dir.path(), Format::Raw, SIZE);
    (dir, Served::new(disk, ServeOptions { max_clients: CLIENTS_UNLIMITED, ..ServeOptions::default() }))
}

/// Sends bytes, says that no more come, and reads what is answered to the end of the connection.
fn send(served: &Served, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(served.socket()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut all = Vec::new();
    // The server may have closed before it took all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    match stream.read_to_end(&mut all) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("no end after {bytes:x?}"),
        _ => all,
    }
}

fn is_well(served: &Served) {
    let file = served.connect().unwrap();
    file.write_at(0, &WriteBufs::from_slice(b"well")).unwrap();
    let mut room = [0; 4];
    file.read_at(0, &ReadBufs::from_slice(&mut room)).unwrap();
    assert_eq!(&room, b"well");
}

#[test]
fn a_server_closes_on_clients_that_make_no_sense() {
    let (_dir, served) = served();
    let flags = hex("00000003");
    let go = [&flags[..], &option(7, &hex(GO))].concat();
    // What is sent; how much is answered after the greeting of 18 bytes: nothing, or the answers to GO (62 bytes).
    for (what, bytes, answered) in [
        ("nothing", vec![], 0),
        ("half of the flags", hex("0000"), 0),
        ("flags that nobody knows", hex("00000007"), 0),
        ("all flags", hex("ffffffff"), 0),
        ("no option magic", [&flags[..], &[0; 16]].concat(), 0),
        ("half an option", [&flags[..], b"IHAVEOPT"].concat(), 0),
        ("an option of 4 GiB", [&flags[..], b"IHAVEOPT", &hex("00000006 ffffffff")].concat(), 0),
        ("an option that never comes", [&flags[..], b"IHAVEOPT", &hex("00000006 00010000")].concat(), 0),
        ("a large option that never comes", [&flags[..], b"IHAVEOPT", &hex("00000006 01000000")].concat(), 0),
        ("an unknown name, the old way", [&flags[..], &option(1, b"other")].concat(), 0),
        ("a name of 4097 bytes, the old way", [&flags[..], &option(1, &[b'a'; 4097])].concat(), 0),
        ("a large name, the old way", [&flags[..], &option(1, &[b'a'; 70_000])].concat(), 0),
        ("text", b"GET / HTTP/1.1\r\n\r\n".to_vec(), 0),
        ("no request magic", [&go[..], &[0; 28]].concat(), 52),
        ("half a request", [&go[..], &hex("25609513 0000")].concat(), 52),
        ("a write without its data", [&go[..], &request(0, 1, 1, 0, 512)].concat(), 52),
        ("a write of 4 GiB", [&go[..], &request(0, 1, 1, 0, u32::MAX), &[0; 4096]].concat(), 52),
        ("a write of 32 MiB and a byte", [&go[..], &request(0, 1, 1, 0, (32 << 20) + 1)].concat(), 52),
        ("a write of 32 MiB that never comes", [&go[..], &request(0, 1, 1, 0, 32 << 20)].concat(), 52),
        ("goodbye, then a request", [&go[..], &request(0, 2, 1, 0, 0), &request(0, 0, 2, 0, 512)].concat(), 52),
    ] {
        assert_eq!(send(&served, &bytes).len(), 18 + answered, "{what}");
    }
    is_well(&served);
}

#[test]
fn options_that_are_too_large_are_refused_and_the_next_one_answered() {
    let (_dir, served) = served();
    let bytes = [&hex("00000003")[..], &option(6, &[0; 70_000]), &option(2, &[])].concat();
    let answer = send(&served, &bytes);
    assert_eq!(answer[18..34], hex("0003e889045565a9 00000006 80000009"));
    assert_eq!(answer[answer.len() - 20..], hex("0003e889045565a9 00000002 00000001 00000000"));
    // A client that asks for ever is stopped.
    let many = [hex("00000003"), option(3, &[]).repeat(2000)].concat();
    let answers = send(&served, &many).len();
    assert_eq!(answers, 18 + 1000 * (20 + 4 + 20));
    is_well(&served);
}

/// Requests that break rules, and the error number in the reply; the connection goes on.
#[test]
fn requests_that_cannot_be_are_answered_with_an_error() {
    const EINVAL: u32 = 22;
    const ENOSPC: u32 = 28;
    let (_dir, served) = served();
    let simple = [hex("00000003"), option(7, &hex(GO))].concat();
    for (flags, command, offset, length, errno) in [
        (0, 0, 0, 512, 0),
        (0, 0, SIZE - 1, 1, 0),
        (0, 0, SIZE, 0, 0),
        (0, 0, SIZE, 1, EINVAL),
        (0, 0, u64::MAX, 1, EINVAL),
        (0, 0, u64::MAX - 511, 512, EINVAL),
        (0, 0, 0, u32::MAX, EINVAL),
        (4, 0, 0, 512, EINVAL), // "don't fragment" without structured replies
        (2, 0, 0, 512, EINVAL),
        (0x8000, 3, 0, 0, EINVAL),
        (0, 1, SIZE - 256, 512, ENOSPC),
        (0, 1, u64::MAX, 512, ENOSPC),
        (2, 1, 0, 512, EINVAL),
        (1, 1, 0, 512, 0),
        (0, 1, 0, 0, 0),
        (0, 3, 0, 0, 0),
        (0, 4, 0, 0, 0),
        (0, 4, 0, SIZE as u32, 0),
        (0, 4, 1, SIZE as u32, EINVAL),
        (0, 5, 0, SIZE as u32, 0),
        (0, 5, 1, SIZE as u32, EINVAL),
        (2, 6, 0, 4096, 0),
        (16, 6, 0, 4096, 0),
        (18, 6, 0, 4096, 95), // fast, and no hole: a raw image has no such way
        (0, 6, 0, u32::MAX, ENOSPC),
        (32, 6, 0, 512, EINVAL),
        (0, 7, 0, 512, EINVAL),      // not negotiated
        (0, 8, 2 * SIZE, 0, EINVAL), // resize, where the server does not offer it
        (0, 99, 0, 0, EINVAL),
        (0, 0xffff, u64::MAX, u32::MAX, EINVAL),
    ] {
        let what = format!("flags {flags:#x} command {command} at {offset:#x}, {length} bytes");
        let payload = if command == 1 { vec![7; length as usize] } else { vec![] };
        // A second request shows that the first has been understood to its end.
        let requests = [request(flags, command, 77, offset, length), payload, request(0, 3, 78, 0, 0)].concat();
        let answer = send(&served, &[simple.clone(), requests].concat());
        let replies = &answer[18 + 52..];
        let data = if command == 0 && errno == 0 { length as usize } else { 0 };
        assert_eq!(replies.len(), 16 + data + 16, "{what}");
        // The two are worked on side by side, so either may come first.
        let at = if replies[8..16] == 78u64.to_be_bytes() { 16 } else { 0 };
        let want = [hex("67446698"), errno.to_be_bytes().to_vec(), 77u64.to_be_bytes().to_vec()].concat();
        assert_eq!(replies[at..at + 16], want, "{what}");
    }
    is_well(&served);
}

#[test]
fn structured_replies_are_what_the_spec_draws() {
    let (_dir, served) = served();
    is_well(&served);
    let start = [hex("00000003"), option(8, &[]), option(10, &hex(SET_META)), option(7, &hex(GO))].concat();
    let skip = 18 + 20 + (20 + 19 + 20) + 52;
    for (what, flags, command, offset, length, want) in [
        ("data", 0, 0, 0, 4, "668e33ef 0001 0001 000000000000004d 0000000c 0000000000000000 77656c6c"),
        ("one chunk", 4, 0, 0, 4, "668e33ef 0001 0001 000000000000004d 0000000c 0000000000000000 77656c6c"),
        ("nothing", 0, 0, 0, 0, "668e33ef 0001 0000 000000000000004d 00000000"),
        ("a hole", 0, 0, 65536, 65536, "668e33ef 0001 0002 000000000000004d 0000000c 0000000000010000 00010000"),
        ("a hole as data", 4, 0, 65536, 4, "668e33ef 0001 0001 000000000000004d 0000000c 0000000000010000 00000000"),
        (
            "status",
            0,
            7,
            0,
            131_072,
            "668e33ef 0001 0005 000000000000004d 00000014 00000001 00001000 00000000 0001f000 00000003",
        ),
        ("one run", 8, 7, 0, 131_072, "668e33ef 0001 0005 000000000000004d 0000000c 00000001 00001000 00000000"),
        (
            "status of nothing",
            0,
            7,
            0,
            0,
            "668e33ef 0001 8001 000000000000004d 00000018 00000016 0012 7468652072616e676520697320656d707479",
        ),
    ] {
        let answer = send(&served, &[start.clone(), request(flags, command, 77, offset, length)].concat());
        assert_eq!(answer[skip..], hex(want), "{what}");
    }
}

/// A long read costs a server little memory: it is answered in parts, which end once, unless one chunk is asked for.
#[test]
fn long_reads_are_answered_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let disk = new_image(dir.path(), Format::Raw, 4 << 20);
    let pattern: Vec<u8> = (0..4u32 << 20).map(|at| (at >> 9) as u8 | 1).collect();
    disk.write(0, &pattern).unwrap();
    let served = Served::new(disk, ServeOptions { max_clients: CLIENTS_UNLIMITED, ..ServeOptions::default() });
    let start = [hex("00000003"), option(8, &[]), option(7, &hex(GO))].concat();
    let skip = 18 + 20 + 20 + 32;
    for (flags, offset, length, want) in [
        (0, 4096, 3 << 20, &[2 << 20, 1 << 20][..]),
        (0, 0, (2 << 20) + 1, &[2 << 20, 1]),
        (0, 0, 2 << 20, &[2 << 20]),
        (4, 0, 3 << 20, &[3 << 20]),
    ] {
        let answer = send(&served, &[start.clone(), request(flags, 0, 77, offset, length)].concat());
        let (mut rest, mut got, mut at) = (&answer[skip..], Vec::new(), offset as usize);
        while !rest.is_empty() {
            let bytes = u32::from_be_bytes(rest[16..20].try_into().unwrap()) as usize - 8;
            let is_last = rest.len() == 28 + bytes;
            assert_eq!(rest[4..8], [0, u8::from(is_last), 0, 1], "{flags} {offset} {length}");
            assert_eq!(rest[20..28], (at as u64).to_be_bytes());
            assert!(rest[28..28 + bytes] == pattern[at..at + bytes]);
            got.push(bytes);
            (rest, at) = (&rest[28 + bytes..], at + bytes);
        }
        assert_eq!(got, want, "{flags} {offset} {length}");
    }
    let outside = send(&served, &[start, request(0, 0, 77, 3 << 20, 2 << 20)].concat());
    assert_eq!(outside[skip..][4..8], hex("0001 8001"), "an error, and nothing before it");
}

/// A server of a few bytes: what it says to one client whatever that asks.
fn against(dir: &std::path::Path, bytes: &[u8], client: impl FnOnce(&std::path::Path)) {
    let path = dir.join("hostile");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(Shutdown::Write);
            // What the client says is taken, so that it does not fail at sending.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        client(&path);
    });
}

fn reply(number: u32, kind: u32, data: &str) -> Vec<u8> {
    let data = hex(data);
    [
        &hex("0003e889045565a9")[..],
        &number.to_be_bytes(),
        &kind.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
        &data,
    ]
    .concat()
}

/// A whole negotiation with structured replies and context 5, for an export of 1 MiB.
fn honest() -> Vec<u8> {
    [
        &b"NBDMAGICIHAVEOPT\0\x03"[..],
        &reply(8, 1, ""),
        &reply(10, 4, "00000005 626173653a616c6c6f636174696f6e"),
        &reply(10, 1, ""),
        &reply(7, 3, "0000 0000000000100000 0dfd"),
        &reply(7, 1, ""),
    ]
    .concat()
}

fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(below) = cause {
        text = format!("{text}: {below}");
        cause = below.source();
    }
    text
}

#[test]
fn a_client_refuses_servers_that_make_no_sense() {
    let dir = tempfile::tempdir().unwrap();
    let greeting = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let no = reply(8, 0x8000_0001, "");
    for (bytes, want) in [
        (vec![], "closed from the other side"),
        (b"NBDMAGIC".to_vec(), "closed from the other side"),
        (b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), "it does not speak NBD: it began with 0x5353482d322e302d"),
        (b"NBDMAGICNBDMAGIC\0\x03".to_vec(), "it does not speak NBD"),
        ([b"NBDMAGIC", &hex("0000420281861253")[..]].concat(), "oldstyle protocol"),
        (greeting.clone(), "closed from the other side"),
        ([&greeting[..], &[0; 20]].concat(), "begins with 0x0, which is no magic number"),
        ([&greeting[..], &reply(7, 1, "")].concat(), "an answer to option 7 came where option 8 was asked"),
        (
            [&greeting[..], &hex("0003e889045565a9 00000008 00000001 ffffffff")].concat(),
            "has 4294967295 bytes; at most 65536",
        ),
        ([&greeting[..], &reply(8, 2, "")].concat(), "an answer of kind 0x2 does not belong to option 8"),
        ([&greeting[..], &reply(8, 0x8000_0005, "")].concat(), "demands TLS"),
        ([&greeting[..], &no, &reply(7, 1, "")].concat(), "did not say how large"),
        ([&greeting[..], &no, &reply(7, 0x8000_0006, "")].concat(), "Requested export not available"),
        ([&greeting[..], &no, &reply(7, 0x8000_0002, "6e6f")].concat(), "refused option 7 (error 0x80000002): no"),
        ([&greeting[..], &no, &reply(7, 3, "0000 ffffffffffffffff 0001"), &reply(7, 1, "")].concat(), "too large"),
        ([&greeting[..], &no, &reply(7, 3, "0003 00000003 00001000 00002000")].concat(), "contradict each other"),
        ([&greeting[..], &no, &reply(7, 3, "0009").repeat(10_001)].concat(), "with more than 10000 messages"),
        ([&greeting[..], &no, &reply(7, 0x8000_0001, ""), &[0; 9]].concat(), "Requested export not available"),
        ([&greeting[..], &reply(8, 1, ""), &reply(10, 4, "0000")].concat(), "ends too early"),
        ([&greeting[..], &reply(8, 1, ""), &reply(10, 4, "00000001 ff")].concat(), "not UTF-8"),
    ] {
        against(dir.path(), &bytes, |path| {
            let error = connect(path, "").map(drop).unwrap_err();
            assert!(words(&error).contains(want), "{} is not {want}", words(&error));
        });
    }
}

#[test]
fn a_client_refuses_replies_that_make_no_sense() {
    let dir = tempfile::tempdir().unwrap();
    let read = |file: &dyn FileBackend| file.read_at(512, &ReadBufs::from_slice(&mut [0; 512]));
    let status = |file: &dyn FileBackend| file.extent(0, 1 << 20).map(drop);
    let write = |file: &dyn FileBackend| file.write_at(0, &WriteBufs::from_slice(&[1; 512]));
    type Call<'a> = &'a dyn Fn(&dyn FileBackend) -> std::io::Result<()>;
    let cases: &[(Call<'_>, &str, &str)] = &[
        (&read, "", "closed from the other side"),
        (&read, "668e33ef 0001", "closed from the other side"),
        (&read, "00000000 00000000 0000000000000001", "no magic number"),
        (&read, "67446698 00000000 0000000000000001", "a simple reply came for a read"),
        (&read, "67446698 00000000 0000000000000002", "cookie 2, which no request has"),
        (&read, "668e33ef 0001 0000 0000000000000001 00000000", "ended with 512 bytes missing"),
        (&read, "668e33ef 0001 0000 0000000000000001 00000001 00", "chunk of kind 0 does not belong"),
        (&read, "668e33ef 0000 0000 0000000000000001 00000000", "chunk of kind 0 does not belong"),
        (&read, "668e33ef 0001 0001 0000000000000001 00000007", "a chunk of data ends too early"),
        (&read, "668e33ef 0001 0001 0000000000000001 00000008 0000000000000200", "covers 0 bytes"),
        (&read, "668e33ef 0001 0001 0000000000000001 ffffffff 0000000000000200", "covers 4294967287 bytes at 512"),
        (&read, "668e33ef 0001 0001 0000000000000001 00000009 0000000000000000 00", "covers 1 bytes at 0"),
        (&read, "668e33ef 0001 0001 0000000000000001 00000009 0000000000000400 00", "covers 1 bytes at 1024"),
        (&read, "668e33ef 0001 0001 0000000000000001 00000009 0000000000000200 00", "511 bytes missing"),
        (&read, "668e33ef 0001 0002 0000000000000001 0000000c 0000000000000200 00000201", "covers 513 bytes"),
        (
            &read,
            "668e33ef 0001 0002 0000000000000001 0000000d 0000000000000200 00000200 00",
            "has 13 bytes; at most 12",
        ),
        (&read, "668e33ef 0001 0002 0000000000000001 0000000b 0000000000000200 000002", "ends too early"),
        (&read, "668e33ef 0001 0005 0000000000000001 0000000c 00000005 00000200 00000000", "chunk of kind 5"),
        (&read, "668e33ef 0001 0009 0000000000000001 00000000", "chunk of kind 9"),
        (&read, "668e33ef 0001 8001 0000000000000001 00000006 00000000 0000", "carries no error"),
        (&read, "668e33ef 0001 8001 0000000000000001 fffffff0", "at most 65536"),
        (&status, "67446698 00000000 0000000000000001", "a simple reply came"),
        (&status, "668e33ef 0001 0000 0000000000000001 00000000", "describes nothing"),
        (&status, "668e33ef 0001 0005 0000000000000001 0000000c 00000006 00000200 00000000", "context 6, not for 5"),
        (&status, "668e33ef 0001 0005 0000000000000001 0000000c 00000005 00000000 00000000", "describes nothing"),
        (&status, "668e33ef 0001 0005 0000000000000001 00000004 00000005", "describes nothing"),
        (&status, "668e33ef 0001 0005 0000000000000001 80000004", "at most 8388608"),
        (&write, "668e33ef 0001 0001 0000000000000001 00000009 0000000000000000 00", "chunk of kind 1"),
        (&write, "67446698 00000005 0000000000000001", "refused the request (error 5)"),
        (&write, "668e33ef 0001 8001 0000000000000001 00000008 00000016 0002 6e6f", "(error 22): no"),
    ];
    for (call, answer, want) in cases {
        let bytes = [honest(), hex(answer)].concat();
        against(dir.path(), &bytes, |path| {
            let file = connect(path, "").unwrap();
            let error = call(&file).unwrap_err();
            let inner: &dyn std::error::Error = error.get_ref().map_or(&error, |inner| inner);
            assert!(words(inner).contains(want), "{answer}: {} is not {want}", words(inner));
        });
    }
    // The table's honest sibling.
    let good = "668e33ef 0000 0002 0000000000000001 0000000c 0000000000000200 000001ff
                668e33ef 0001 0001 0000000000000001 00000009 00000000000003ff 07";
    against(dir.path(), &[honest(), hex(good)].concat(), |path| {
        let mut room = [1; 512];
        connect(path, "").unwrap().read_at(512, &ReadBufs::from_slice(&mut room)).unwrap();
        assert_eq!((room[..511].to_vec(), room[511]), (vec![0; 511], 7));
    });
}

/// Changes bytes here and there, cuts and doubles, puts in numbers at the edge.
fn mutate(bytes: &mut Vec<u8>, keep: usize, rng: &mut Rng) {
    const EDGES: [u32; 8] = [0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 0x0200_0000, 0x0001_0000, 0xffff];
    for _ in 0..rng.below(4) + 1 {
        let span = (bytes.len() - keep) as u64;
        let at = keep + rng.below(span) as usize;
        match rng.below(6) {
            0 => bytes.truncate(at),
            1 => {
                let part = bytes[at..].to_vec();
                bytes.extend(part);
            }
            2 if at + 4 <= bytes.len() => {
                let edge = EDGES[rng.below(8) as usize];
                bytes[at..at + 4].copy_from_slice(&edge.to_be_bytes());
            }
            3 => bytes.insert(at, rng.next() as u8),
            _ if at < bytes.len() => bytes[at] = rng.next() as u8,
            _ => {}
        }
        if bytes.len() <= keep {
            return;
        }
    }
}

#[test]
fn random_clients_do_no_harm() {
    let (_dir, served) = served();
    let options = [option(3, &[]), option(8, &[]), option(9, &hex("00000000 00000000")), option(10, &hex(SET_META))];
    let requests = [
        request(0, 0, 1, 0, 4096),
        [request(1, 1, 2, 512, 64), vec![9; 64]].concat(),
        request(0, 3, 3, 0, 0),
        request(0, 4, 4, 0, 65536),
        request(0, 5, 5, 0, 65536),
        request(0, 6, 6, 4096, 65536),
        request(0, 7, 7, 0, 1 << 20),
    ];
    let whole =
        [hex("00000003"), options.concat(), option(6, &hex(GO)), option(7, &hex(GO)), requests.concat()].concat();
    for seed in 1..600 {
        let mut rng = Rng(seed);
        let mut bytes = whole.clone();
        // Half of the time the negotiation stays right, so that requests are reached.
        let keep = if seed % 2 == 0 { 0 } else { whole.len() - requests.concat().len() };
        mutate(&mut bytes, keep, &mut rng);
        eprintln!("seed {seed}");
        send(&served, &bytes);
    }
    is_well(&served);
    served.end().unwrap();
}

#[test]
fn random_servers_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let replies = "668e33ef 0000 0002 0000000000000001 0000000c 0000000000000000 00000800
                   668e33ef 0001 0001 0000000000000001 00000808 0000000000000800"
        .to_owned()
        + &"77".repeat(2048)
        + "67446698 00000000 0000000000000002
           668e33ef 0001 0005 0000000000000003 00000014 00000005 00001000 00000000 0001f000 00000003
           668e33ef 0001 8001 0000000000000004 00000008 00000016 0002 6e6f";
    let whole = [honest(), hex(&replies)].concat();
    for seed in 1..600 {
        let mut rng = Rng(seed);
        let mut bytes = whole.clone();
        let keep = if seed % 2 == 0 { 0 } else { honest().len() };
        mutate(&mut bytes, keep, &mut rng);
        eprintln!("seed {seed}");
        against(dir.path(), &bytes, |path| {
            let Ok(file) = connect(path, "") else { return };
            let mut room = [0; 4096];
            let _ = file.read_at(0, &ReadBufs::from_slice(&mut room));
            let _ = file.write_at(0, &WriteBufs::from_slice(&[1; 512]));
            let _ = file.extent(0, 1 << 20);
            let _ = file.sync_data();
        });
    }
}

/// Several threads wait for replies of a server that breaks off: all are told, none waits for ever.
#[test]
fn all_who_wait_hear_of_the_end() {
    let dir = tempfile::tempdir().unwrap();
    against(dir.path(), &honest(), |path| {
        let file = connect(path, "").unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let file = &file;
                scope.spawn(move || {
                    let error = file.read_at(thread * 512, &ReadBufs::from_slice(&mut [0; 512])).unwrap_err();
                    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
                });
            }
        });
    });
}

/// Reads of a connection until two requests have come: cookie and offset of each.
fn two_requests(stream: &mut UnixStream) -> [(u64, u64); 2] {
    let (mut seen, mut room) = (Vec::new(), [0; 256]);
    loop {
        let count = stream.read(&mut room).unwrap();
        assert!(count > 0, "the client left");
        seen.extend(&room[..count]);
        let starts = seen.windows(4).enumerate().filter(|(_, window)| window == &hex("25609513")).map(|(at, _)| at);
        let word = |at: usize| seen.get(at..at + 8).map(|word| u64::from_be_bytes(word.try_into().unwrap()));
        let found: Vec<_> = starts.filter(|at| at + 28 <= seen.len()).map(|at| (word(at + 8), word(at + 16))).collect();
        if let [(Some(a), Some(b)), (Some(c), Some(d))] = found[..] {
            return [(a, b), (c, d)];
        }
    }
}

/// A reply in two chunks with the whole of another one between them: whichever thread reads, each gets its own bytes.
#[test]
fn chunks_of_two_replies_may_be_mixed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mixed");
    let listener = UnixListener::bind(&path).unwrap();
    for round in 0..40 {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(&honest()).unwrap();
                let mut requests = two_requests(&mut stream);
                if round % 2 == 0 {
                    requests.reverse();
                }
                let chunk = |(cookie, offset): (u64, u64), half: u64| {
                    let head = hex(if half == 0 { "668e33ef 0000 0001" } else { "668e33ef 0001 0001" });
                    let at = offset + half * 256;
                    let length = 264u32.to_be_bytes();
                    let data = [(offset / 512 * 2 + half) as u8; 256];
                    [&head[..], &cookie.to_be_bytes(), &length, &at.to_be_bytes(), &data].concat()
                };
                let [first, second] = requests;
                let replies = [chunk(first, 0), chunk(second, 0), chunk(second, 1), chunk(first, 1)].concat();
                stream.write_all(&replies).unwrap();
                let _ = stream.read_to_end(&mut Vec::new());
            });
            let file = connect(&path, "").unwrap();
            std::thread::scope(|scope| {
                for sector in [1u64, 2] {
                    let file = &file;
                    scope.spawn(move || {
                        let mut room = [0; 512];
                        file.read_at(sector * 512, &ReadBufs::from_slice(&mut room)).unwrap();
                        let value = sector as u8 * 2;
                        assert_eq!((&room[..256], &room[256..]), (&[value; 256][..], &[value + 1; 256][..]));
                    });
                }
            });
        });
    }
}
