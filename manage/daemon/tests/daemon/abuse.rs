//! Everything a hostile client can do to the byte stream: it gets an error or is cut off, and nobody else notices.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rpc_wire::frame::{
    Frame, FrameReader, Header, KEEPALIVE_PING, KEEPALIVE_PONG, KEEPALIVE_PROGRAM, MessageType, REMOTE_PROGRAM, Status,
    frame_of,
};
use rpc_wire::remote::{
    auth_list, connect_get_all_domain_stats, connect_list_all_domains, connect_open, domain_define_xml,
};
use rpc_wire::xdr::{List, Xdr, from_bytes};
use rpc_wire::{Call, ErrorBody};

use crate::session::{DEADLINE, Session};

/// A write that takes so long is not going on.
const STANDSTILL: Duration = Duration::from_secs(1);

/// A client that says exactly what it is told to.
pub struct Raw {
    pub socket: UnixStream,
    reader: FrameReader,
}

impl Raw {
    pub fn connect(session: &Session) -> Raw {
        Raw { socket: session.connect(), reader: FrameReader::new() }
    }

    /// A client that has opened its connection.
    pub fn opened(session: &Session) -> Raw {
        let mut raw = Raw::connect(session);
        let reply = raw.call::<connect_open::Proc>(0, &connect_open::Args { name: None, flags: 0 });
        assert_eq!(reply.header.status, Status::Ok);
        raw
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// The next packet; `None` when the daemon has hung up.
    pub fn next(&mut self) -> Option<Frame> {
        let mut bytes = vec![0; 65536];
        loop {
            if let Some(frame) = self.reader.next_frame().unwrap() {
                return Some(frame);
            }
            match self.socket.read(&mut bytes) {
                Ok(0) => return None,
                Ok(count) => self.reader.push(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("the daemon neither answers nor hangs up: {error}"),
            }
        }
    }

    pub fn call<P: Call>(&mut self, serial: u32, args: &P::Args) -> Frame {
        self.send(&frame_of(Header::call(P::PROGRAM, P::NUMBER, serial), args));
        self.next().unwrap()
    }

    fn error(&mut self) -> (i32, i32, String) {
        let frame = self.next().expect("an answer");
        assert_eq!((frame.header.kind, frame.header.status), (MessageType::Reply, Status::Error));
        let body: ErrorBody = from_bytes(&frame.payload).unwrap();
        (body.code, body.domain, body.message.unwrap().lossy().into_owned())
    }
}

fn header(program: u32, version: u32, procedure: u32, kind: u32, status: u32) -> Vec<u8> {
    let words = [28, program, version, procedure, kind, 7, status];
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

#[test]
fn calls_that_make_no_sense_are_answered_with_libvirts_errors() {
    let session = Session::start();
    let mut raw = Raw::opened(&session);
    let mut check = |bytes: &[u8], expected: (i32, i32, &str)| {
        raw.send(bytes);
        let (code, domain, message) = raw.error();
        assert_eq!((code, domain, message.as_str()), expected);
    };
    check(&header(REMOTE_PROGRAM, 1, 9999, 0, 0), (39, 7, "unknown procedure: 9999"));
    check(&header(REMOTE_PROGRAM, 1, 0, 0, 0), (39, 7, "unknown procedure: 0"));
    check(&header(REMOTE_PROGRAM, 1, 318, 0, 0), (39, 7, "unknown procedure: 318"));
    check(&header(0x2000_8088, 1, 1, 0, 0), (39, 7, "Cannot find program 536903816 version 1"));
    check(&header(REMOTE_PROGRAM, 2, 1, 0, 0), (39, 7, "Cannot find program 536903814 version 2"));
    check(&header(REMOTE_PROGRAM, 1, 3, 0, 2), (39, 7, "a call cannot have status 2"));
    let cut = "Unable to decode message payload: payload ends 4 bytes before the end of a value";
    check(&header(REMOTE_PROGRAM, 1, 23, 0, 0), (39, 7, cut));
    let no_save = "this function is not supported by the connection driver: virDomainSave";
    check(&header(REMOTE_PROGRAM, 1, 55, 0, 0), (3, 10, no_save));
    // Lists that promise more than they bring, or more than there may be.
    let mut lie = frame_of(Header::call(REMOTE_PROGRAM, 344, 7), &(16000u32, 0u32));
    check(&lie, (39, 7, "Unable to decode message payload: payload ends 383996 bytes before the end of a value"));
    lie = frame_of(Header::call(REMOTE_PROGRAM, 344, 7), &(u32::MAX, 0u32));
    check(&lie, (39, 7, "Unable to decode message payload: length 4294967295 of list is over the limit of 16384"));
    // The connection is as good as before.
    assert_eq!(raw.call::<auth_list::Proc>(9, &auth_list::Args {}).header.serial, 9);
}

#[test]
fn nothing_can_be_asked_before_the_connection_is_opened() {
    let session = Session::start();
    let mut raw = Raw::connect(&session);
    raw.send(&frame_of(Header::call(REMOTE_PROGRAM, 59, 0), &()));
    assert_eq!(raw.error(), (1, 7, "the connection has not been opened".into()));
    // A stranger's packets are small.
    raw.send(&[0, 0x10, 0, 0]);
    assert!(raw.next().is_none());
}

#[test]
fn bytes_that_are_no_packets_end_the_connection_and_no_other() {
    let session = Session::start();
    let mut neighbour = Raw::opened(&session);
    for bytes in [
        vec![0xff; 64],
        vec![0; 4],
        27u32.to_be_bytes().to_vec(),
        header(REMOTE_PROGRAM, 1, 3, 9, 0),
        header(REMOTE_PROGRAM, 1, 3, 0, 9),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
    ] {
        let mut raw = Raw::opened(&session);
        raw.send(&bytes);
        assert!(raw.next().is_none(), "{bytes:?}");
        assert_eq!(neighbour.call::<auth_list::Proc>(1, &auth_list::Args {}).header.status, Status::Ok);
    }
    // Half a packet, and gone.
    let mut raw = Raw::opened(&session);
    raw.send(&frame_of(Header::call(REMOTE_PROGRAM, 3, 0), &())[..20]);
    drop(raw);
    assert_eq!(session.virsh("list --name"), "\n");
}

#[test]
fn random_bytes_after_a_valid_header_never_stop_the_daemon() {
    let session = Session::start();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut raw = Raw::opened(&session);
    for round in 0..2000u32 {
        let procedure = 1 + (next() % 460) as u32;
        // Closing the connection and registering for ever are tested elsewhere.
        if matches!(procedure, 2 | 105 | 167 | 316) {
            continue;
        }
        let payload: Vec<u32> =
            (0..next() % 12).map(|_| if next() % 3 == 0 { next() as u32 } else { next() as u32 % 4 }).collect();
        let mut packet = Vec::new();
        rpc_wire::frame::write_frame(&mut packet, Header::call(REMOTE_PROGRAM, procedure, round), |out| {
            payload.iter().for_each(|word| word.encode(out));
        });
        raw.send(&packet);
        let answer =
            raw.next().unwrap_or_else(|| panic!("procedure {procedure}, {payload:?}: hung up\n{}", session.log()));
        assert_eq!(answer.header.serial, round);
    }
    assert_eq!(session.virsh("list --all --name"), "\n");
    assert!(!session.log().contains("panicked"), "{}", session.log());
}

#[test]
fn keepalive_is_answered_and_stray_stream_packets_are_dropped() {
    let session = Session::start();
    let mut raw = Raw::opened(&session);
    raw.send(&frame_of(Header::keepalive(KEEPALIVE_PING), &()));
    let pong = raw.next().unwrap().header;
    assert_eq!((pong.program, pong.procedure, pong.serial), (KEEPALIVE_PROGRAM, KEEPALIVE_PONG, 0));
    for (kind, status) in [(3, 0), (3, 1), (3, 2), (6, 2), (1, 0), (2, 0)] {
        raw.send(&header(REMOTE_PROGRAM, 1, 201, kind, status));
    }
    assert_eq!(raw.call::<auth_list::Proc>(11, &auth_list::Args {}).header.serial, 11);
}

/// Resident memory of the daemon in KiB.
pub fn resident_kib(session: &Session) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", session.daemon_pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_client_that_does_not_read_costs_bounded_memory() {
    let session = Session::start();
    for index in 0..50 {
        session.define(&format!("vm{index}"), "");
    }
    let mut slow = Raw::opened(&session);
    let args = connect_get_all_domain_stats::Args { doms: List::default(), stats: 0, flags: 0 };
    let packet = frame_of(Header::call(REMOTE_PROGRAM, 344, 1), &args);
    // As many calls as the daemon takes without an answer being read: then a write stands still.
    slow.socket.set_write_timeout(Some(STANDSTILL)).unwrap();
    let mut sent = 0u32;
    loop {
        match slow.socket.write(&packet) {
            Ok(_) => sent += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 1_000_000, "the daemon takes calls for ever");
    }
    let before = Instant::now();
    assert_eq!(session.virsh("list --all --name").lines().count(), 50);
    assert!(before.elapsed() < DEADLINE);
    let resident = resident_kib(&session);
    assert!(resident < 64 << 10, "{sent} unread answers hold {resident} KiB");
}

#[test]
fn documents_of_any_size_and_shape_are_refused_in_good_order() {
    let session = Session::start();
    let mut raw = Raw::opened(&session);
    let mut check = |document: String, expected: &str| {
        raw.send(&frame_of(Header::call(REMOTE_PROGRAM, 11, 3), &domain_define_xml::Args { xml: document.into() }));
        let (_, _, message) = raw.error();
        assert!(message.contains(expected), "{expected}: {message}");
    };
    check("<a>".repeat(100_000), "deep");
    check("<domain>".to_owned() + &"<x/>".repeat(900_000) + "</domain>", "");
    let billion = "<!DOCTYPE d [<!ENTITY a \"lol\"><!ENTITY b \"&a;&a;&a;\">]><domain>&b;</domain>";
    check(billion.into(), "");
    check("<!DOCTYPE d SYSTEM \"file:///etc/passwd\"><domain/>".into(), "");
    check("<domain type='qemu'><name>&x;</name></domain>".into(), "");
    check("x".repeat(4 << 20), "");
    let over = "x".repeat((4 << 20) + 1);
    let mut packet = Vec::new();
    rpc_wire::frame::write_frame(&mut packet, Header::call(REMOTE_PROGRAM, 11, 4), |out| {
        (over.len() as u32).encode(out);
        out.extend_from_slice(over.as_bytes());
        out.extend_from_slice(&[0; 3]);
    });
    raw.send(&packet);
    assert_eq!(raw.error().0, 39);
    let resident = resident_kib(&session);
    assert!(resident < 96 << 10, "{resident} KiB");
}

#[test]
fn a_thousand_idle_clients_and_a_hundred_busy_ones_are_served() {
    let session = Session::start();
    session.define("vm1", "");
    let idle: Vec<Raw> = (0..1000).map(|_| Raw::opened(&session)).collect();
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let mut raw = Raw::opened(&session);
                for serial in 0..50 {
                    let args = connect_list_all_domains::Args { need_results: 1, flags: 0 };
                    let reply = raw.call::<connect_list_all_domains::Proc>(serial, &args);
                    let reply: connect_list_all_domains::Reply = from_bytes(&reply.payload).unwrap();
                    assert_eq!(reply.domains.0.len(), 1);
                }
            });
        }
    });
    let resident = resident_kib(&session);
    assert!(resident < 48 << 10, "{} clients cost {resident} KiB", idle.len());
}
