//! More clients than any host has, and clients that hold on to memory: the daemon keeps its bounds and its manners.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;

use rpc_wire::frame::{Header, REMOTE_PROGRAM, Status, frame_of};
use rpc_wire::remote::auth_list;
use rustix::process::{Resource, Rlimit};

use crate::abuse::{Raw, resident_kib};
use crate::session::Session;

/// Clients that a daemon takes at once.
const CLIENTS_MAX: usize = 10_000;
/// Descriptors that this program and the daemon need beside them.
const RESERVED: usize = 512;

/// As many clients as the limit of open files lets this program and the daemon have.
fn most_clients() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // All that is allowed; a host that allows less is tested with less.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let limit = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(RESERVED).min(CLIENTS_MAX)
}

#[test]
fn ten_thousand_clients_with_half_a_packet_each_disturb_nobody() {
    let most = most_clients();
    let session = Session::start();
    let mut neighbour = Raw::opened(&session);
    let half = &frame_of(Header::call(REMOTE_PROGRAM, 66, 0), &())[..20];
    // One place is the neighbour's.
    let crowd: Vec<Raw> = (1..most)
        .map(|_| {
            let mut raw = Raw::connect(&session);
            raw.send(half);
            raw
        })
        .collect();
    assert_eq!(neighbour.call::<auth_list::Proc>(1, &auth_list::Args {}).header.status, Status::Ok);
    // The next one is told so at once rather than left waiting.
    assert!(Raw::connect(&session).next().is_none());
    let resident = resident_kib(&session);
    assert!(resident < 64 << 10, "{} clients cost {resident} KiB", crowd.len());
    drop(crowd);
    assert_eq!(session.virsh("list --all --name"), "\n");
    assert_eq!(neighbour.call::<auth_list::Proc>(2, &auth_list::Args {}).header.status, Status::Ok);
    assert!(!session.log().contains("panicked"), "{}", session.log());
}

/// Sends as much of a packet of 32 MiB as the daemon takes; whether it hung up in between.
fn cut_off(socket: &mut UnixStream, almost_all: &[u8]) -> bool {
    match socket.write_all(almost_all) {
        Ok(()) => false,
        Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => true,
        Err(error) => panic!("the daemon neither takes the bytes nor hangs up: {error}"),
    }
}

#[test]
fn packets_that_never_end_share_one_budget() {
    const PACKET_BYTES: usize = 32 << 20;
    let session = Session::start();
    let mut neighbour = Raw::opened(&session);
    let mut almost_all = vec![0; PACKET_BYTES - 4096];
    almost_all[..4].copy_from_slice(&(PACKET_BYTES as u32).to_be_bytes());
    // Program, version, procedure, type, serial, status of a call that exists.
    for (index, word) in [REMOTE_PROGRAM, 1, 11, 0, 1, 0].into_iter().enumerate() {
        almost_all[4 + index * 4..8 + index * 4].copy_from_slice(&word.to_be_bytes());
    }
    let mut hoarders: Vec<Raw> = (0..12).map(|_| Raw::opened(&session)).collect();
    let cut = hoarders.iter_mut().filter_map(|raw| cut_off(&mut raw.socket, &almost_all).then_some(())).count();
    assert!(cut >= 4, "{cut} of 12 were cut off");
    assert_eq!(neighbour.call::<auth_list::Proc>(1, &auth_list::Args {}).header.status, Status::Ok);
    let resident = resident_kib(&session);
    assert!(resident < 320 << 10, "{resident} KiB");
    // What they held is free again.
    drop(hoarders);
    session.wait_for("list --all", "----");
    let mut late = Raw::opened(&session);
    assert!(!cut_off(&mut late.socket, &almost_all));
    assert_eq!(neighbour.call::<auth_list::Proc>(2, &auth_list::Args {}).header.status, Status::Ok);
}
