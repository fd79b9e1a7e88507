//! Client and server of NBD with each other: many threads on one connection against a model of the disk, and how
//! connections begin and end.

mod nbd_support;
mod support;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Barrier, Condvar, Mutex};
use std::time::{Duration, Instant};

use block::nbd::{CLIENTS_UNLIMITED, Listener, NbdError, NbdFile, ServeOptions, Stop, serve};
use block::spec::{NbdAddress, NbdSpec, NbdTls};
use block::{ChainBackend, Disk, FileBackend, Format, OpenOptions, ReadBackend, ReadBufs, ReadOnly, WriteBufs};
use nbd_support::{Served, new_image};
use support::Rng;

const THREADS: u64 = 6;
/// What one thread has for itself.
const REGION: u64 = 1 << 20;

/// Random requests of one thread to its region, and what the region has to hold.
fn exercise(file: &NbdFile, start: u64, rng: &mut Rng, steps: usize) -> Vec<u8> {
    let mut model = vec![0u8; REGION as usize];
    let mut room = vec![0u8; REGION as usize];
    for step in 0..steps {
        let offset = rng.below(REGION);
        let most = if rng.below(8) == 0 { REGION } else { 20_000 };
        let bytes = rng.below(most.min(REGION - offset)) + 1;
        let range = offset as usize..(offset + bytes) as usize;
        match rng.below(10) {
            0..4 => {
                let value = rng.next();
                let data: Vec<u8> = (0..bytes).map(|i| (value.rotate_left((i % 61) as u32) as u8) | 1).collect();
                file.write_at(start + offset, &WriteBufs::from_slice(&data)).unwrap();
                model[range].copy_from_slice(&data);
            }
            4 => {
                file.write_zeroes(start + offset, bytes, rng.below(2) == 0).unwrap();
                model[range].fill(0);
            }
            5 => {
                file.punch_hole(start + offset, bytes).unwrap();
                // Zero or unchanged: what it is now, it stays.
                let now = &mut room[range.clone()];
                file.read_at(start + offset, &ReadBufs::from_slice(now)).unwrap();
                for (was, is) in model[range.clone()].iter().zip(now.iter()) {
                    assert!(is == was || *is == 0, "step {step}");
                }
                model[range.clone()].copy_from_slice(&room[range]);
            }
            6 => file.sync_data().unwrap(),
            7 => {
                let (run, is_data) = file.extent(start + offset, bytes).unwrap();
                assert!((1..=bytes).contains(&run));
                let run = offset as usize..(offset + run) as usize;
                assert!(is_data || model[run].iter().all(|b| *b == 0), "step {step}: data is called a hole");
            }
            _ => {
                let now = &mut room[range.clone()];
                now.fill(0xee);
                file.read_at(start + offset, &ReadBufs::from_slice(now)).unwrap();
                assert!(now == &model[range], "step {step}: {bytes} bytes at {offset}");
            }
        }
    }
    model
}

#[test]
fn threads_share_a_connection_and_find_what_they_wrote() {
    for (format, workers) in [(Format::Raw, 1), (Format::Raw, 4), (Format::Qcow2, 4)] {
        let dir = tempfile::tempdir().unwrap();
        let disk = new_image(dir.path(), format, THREADS * REGION);
        let served = Served::new(disk, ServeOptions { workers, ..ServeOptions::default() });
        let file = served.connect().unwrap();
        assert_eq!(file.len_bytes().unwrap(), THREADS * REGION);
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let start = |thread: u64| {
                let file = &file;
                scope.spawn(move || exercise(file, thread * REGION, &mut Rng(0x5eed + thread), 150))
            };
            let threads: Vec<_> = (0..THREADS).map(start).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let mut found = vec![0; REGION as usize];
        for (thread, model) in models.iter().enumerate() {
            served.disk.read(thread as u64 * REGION, &mut found).unwrap();
            assert!(found == *model, "{format}: region {thread}");
        }
        drop(file);
        served.end().unwrap();
    }
}

#[test]
fn a_client_waits_until_there_is_room_and_a_server_ends_with_the_last() {
    let dir = tempfile::tempdir().unwrap();
    let options = ServeOptions { persistent: false, ..ServeOptions::default() };
    let served = Served::new(new_image(dir.path(), Format::Raw, 1 << 20), options);
    let first = served.connect().unwrap();
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            barrier.wait();
            served.connect().map(|file| file.len_bytes().unwrap())
        });
        barrier.wait();
        // The second client is not served while the first is there.
        first.write_at(0, &WriteBufs::from_slice(b"first")).unwrap();
        assert!(!waiting.is_finished());
        drop(first);
        // It finds a server, or that the server ended with the first client: both are right, the order is chance.
        drop(waiting.join().unwrap());
    });
    served.join().unwrap();
}

#[test]
fn clients_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let options = ServeOptions { max_clients: CLIENTS_UNLIMITED, ..ServeOptions::default() };
    let served = Served::new(new_image(dir.path(), Format::Raw, 1 << 20), options);
    let files: Vec<NbdFile> = (0..20).map(|_| served.connect().unwrap()).collect();
    for (i, file) in files.iter().enumerate() {
        file.write_at(i as u64 * 512, &WriteBufs::from_slice(&[i as u8 + 1; 512])).unwrap();
    }
    for file in &files {
        let mut all = vec![0; 20 * 512];
        file.read_at(0, &ReadBufs::from_slice(&mut all)).unwrap();
        assert!(all.chunks(512).enumerate().all(|(i, sector)| sector == [i as u8 + 1; 512]));
    }
    // The server stops although clients are there; they are told.
    served.end().unwrap();
    for file in &files {
        let error = file.read_at(0, &ReadBufs::from_slice(&mut [0; 512])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
        assert!(error.to_string().contains("the connection is lost"), "{error}");
    }
}

#[test]
fn a_client_that_reads_nothing_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let options = ServeOptions { max_clients: CLIENTS_UNLIMITED, ..ServeOptions::default() };
    let served = Served::new(new_image(dir.path(), Format::Raw, 8 << 20), options);
    let mut silent = UnixStream::connect(served.socket()).unwrap();
    let mut bytes = b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0".to_vec();
    for cookie in 0..16u8 {
        bytes.extend(b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0");
        bytes.extend([cookie, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0]);
    }
    silent.write_all(&bytes).unwrap();
    let file = served.connect().unwrap();
    for at in 0..64 {
        file.write_at(at * 4096, &WriteBufs::from_slice(&[1; 4096])).unwrap();
        file.sync_data().unwrap();
    }
    // Nor does it keep the server from ending.
    served.end().unwrap();
    // What was read before is there: the greeting of 18 bytes, size and flags, and a part of the data.
    let mut all = Vec::new();
    silent.read_to_end(&mut all).unwrap();
    assert!(all.len() > 28 && all.len() < 16 << 22, "{}", all.len());
}

#[test]
fn a_client_that_does_not_agree_on_options_in_time_is_sent_away() {
    let dir = tempfile::tempdir().unwrap();
    let options = ServeOptions { handshake_limit: Some(Duration::from_millis(20)), ..ServeOptions::default() };
    let served = Served::new(new_image(dir.path(), Format::Raw, 4096), options);
    for said in [&b""[..], b"\0\0", b"\0\0\0\x03IHAVEOPT\0\0\0\x06\0\x01\0\0"] {
        let mut slow = UnixStream::connect(served.socket()).unwrap();
        slow.write_all(said).unwrap();
        let mut all = Vec::new();
        slow.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"NBDMAGICIHAVEOPT\0\x03");
    }
    drop(served.connect().unwrap());
}

#[test]
fn tcp_is_as_good() {
    let dir = tempfile::tempdir().unwrap();
    let disk = new_image(dir.path(), Format::Raw, REGION);
    let listener = Listener::tcp("127.0.0.1", 0).unwrap();
    let address = NbdAddress::Tcp { host: "localhost".into(), port: listener.port().unwrap() };
    let stop = Stop::new().unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&listener, &disk, &ServeOptions::default(), &stop));
        let file = NbdFile::connect(&NbdSpec::new(address, ""), None).unwrap();
        let model = exercise(&file, 0, &mut Rng(3), 40);
        stop.stop();
        server.join().unwrap().unwrap();
        let mut found = vec![0; REGION as usize];
        disk.read(0, &mut found).unwrap();
        assert!(found == model);
    });
    let error = NbdFile::connect(&NbdSpec::new(NbdAddress::Tcp { host: "127.0.0.1".into(), port: 1 }, ""), None);
    assert_eq!(error.map(drop).unwrap_err().to_string(), "Failed to connect to '127.0.0.1:1'");
}

#[test]
fn the_end_of_an_export() {
    let dir = tempfile::tempdir().unwrap();
    let served = Served::new(
        new_image(dir.path(), Format::Raw, 8192),
        ServeOptions { offset: 4096, name: "näme".into(), ..ServeOptions::default() },
    );
    let file = served.connect().unwrap();
    assert_eq!(file.len_bytes().unwrap(), 4096);
    let mut room = [1u8; 1024];
    file.write_at(3584, &WriteBufs::from_slice(&[7; 512])).unwrap();
    file.read_at(3584, &ReadBufs::from_slice(&mut room)).unwrap();
    assert_eq!((room[..512].to_vec(), room[512..].to_vec()), (vec![7; 512], vec![0; 512]));
    // Zeroes past the end are there already; data is not taken.
    file.write_at(4096, &WriteBufs::from_slice(&[0; 512])).unwrap();
    let error = file.write_at(3584, &WriteBufs::from_slice(&[7; 1024])).unwrap_err();
    assert!(error.to_string().contains("past the end of the export (4096 bytes)"), "{error}");
    assert_eq!(file.extent(4096, 512).unwrap(), (512, false));
    assert!(file.set_len_bytes(4096).is_ok());
    assert_eq!(file.set_len_bytes(8192).unwrap_err().kind(), ErrorKind::Unsupported);
    served.disk.read(7680, &mut room[..512]).unwrap();
    assert_eq!(room[..512], [7; 512]);
    drop(file);
    let error = nbd_support::connect(&served.socket(), "name").map(drop).unwrap_err();
    let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert!(text.contains("Requested export not available: 'name'"), "{text}");
}

#[test]
fn nobody_writes_to_a_read_only_export() {
    let dir = tempfile::tempdir().unwrap();
    let options = ServeOptions { read_only: true, ..ServeOptions::default() };
    let served = Served::new(new_image(dir.path(), Format::Raw, 8192), options);
    let file = served.connect().unwrap();
    assert!(file.is_read_only());
    for result in
        [file.write_at(0, &WriteBufs::from_slice(b"x")), file.write_zeroes(0, 512, true), file.punch_hole(0, 512)]
    {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    }
    file.sync_data().unwrap();
}

#[test]
fn a_client_changes_the_size_where_it_may() {
    const MIB: u64 = 1 << 20;
    for (format, offset) in [(Format::Raw, 0), (Format::Raw, 4096), (Format::Qcow2, 0)] {
        let dir = tempfile::tempdir().unwrap();
        let options = ServeOptions { resizable: true, max_clients: 2, offset, ..ServeOptions::default() };
        let served = Served::new(new_image(dir.path(), format, MIB + offset), options);
        let file = served.connect().unwrap();
        let sizes = |bytes: u64| {
            assert_eq!(served.disk.size_bytes(), bytes + offset, "{format}");
            assert_eq!(served.connect().unwrap().len_bytes().unwrap(), bytes, "{format}");
        };
        // A hole that was found ends where the export ended.
        assert_eq!(file.extent(0, 2 * MIB).unwrap().0, MIB);
        file.set_len_bytes(4 * MIB).unwrap();
        sizes(4 * MIB);
        file.write_at(4 * MIB - 512, &WriteBufs::from_slice(&[7; 512])).unwrap();
        let mut found = [0; 512];
        served.disk.read(offset + 4 * MIB - 512, &mut found).unwrap();
        assert_eq!((found, file.len_bytes().unwrap()), ([7; 512], 4 * MIB));
        // Sizes that cannot be change nothing.
        for bytes in [MIB + 5, u64::MAX - 511, 1 << 63] {
            file.set_len_bytes(bytes).unwrap_err();
        }
        sizes(4 * MIB);
        // Another client would lose what it may be about to read.
        let other = served.connect().unwrap();
        assert_eq!(file.set_len_bytes(MIB).unwrap_err().kind(), ErrorKind::PermissionDenied);
        other.set_len_bytes(5 * MIB).unwrap();
        file.read_at(0, &ReadBufs::from_slice(&mut found)).unwrap();
        drop(other);
        sizes(5 * MIB);
        // The server notices in its own time that the others have left.
        while let Err(error) = file.set_len_bytes(MIB) {
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
            std::thread::yield_now();
        }
        sizes(MIB);
        assert!(file.write_at(MIB, &WriteBufs::from_slice(&[7; 512])).is_err());
        file.write_at(0, &WriteBufs::from_slice(&[9; 512])).unwrap();
        served.disk.read(offset, &mut found).unwrap();
        assert_eq!(found, [9; 512]);
    }
    // Nobody changes what may only be read.
    let dir = tempfile::tempdir().unwrap();
    let options = ServeOptions { resizable: true, read_only: true, ..ServeOptions::default() };
    let served = Served::new(new_image(dir.path(), Format::Raw, MIB), options);
    let error = served.connect().unwrap().set_len_bytes(2 * MIB).unwrap_err();
    assert_eq!((error.kind(), served.disk.size_bytes()), (ErrorKind::Unsupported, MIB));
    assert!(error.to_string().contains("--resizable"), "{error}");
}

/// An export on a socket file, with seconds for the server to come and to come back.
fn patient(socket: &Path, open_timeout_s: u32, reconnect_delay_s: u32) -> NbdSpec {
    NbdSpec { open_timeout_s, reconnect_delay_s, ..NbdSpec::new(NbdAddress::Unix(socket.to_owned()), "") }
}

#[test]
fn a_client_waits_for_its_server() {
    let dir = tempfile::tempdir().unwrap();
    let disk = new_image(dir.path(), Format::Raw, 8192);
    let socket = dir.path().join("s");
    assert!(NbdFile::connect(&patient(&socket, 0, 0), None).is_err());
    let start = Instant::now();
    assert!(NbdFile::connect(&patient(&socket, 1, 0), None).is_err());
    assert!(start.elapsed() >= Duration::from_secs(1));
    // What waiting does not change is told at once.
    let tls = NbdSpec { tls: Some(NbdTls::default()), ..patient(&socket, 600, 0) };
    assert!(matches!(NbdFile::connect(&tls, None), Err(NbdError::NoCredentials { .. })));
    let stop = Stop::new().unwrap();
    std::thread::scope(|scope| {
        let client = scope.spawn(|| NbdFile::connect(&patient(&socket, 600, 0), None));
        let listener = Listener::unix(&socket).unwrap();
        let (disk, stop) = (&disk, &stop);
        let server = scope.spawn(move || serve(&listener, disk, &ServeOptions::default(), stop));
        let file = client.join().unwrap();
        stop.stop();
        server.join().unwrap().unwrap();
        assert_eq!(file.unwrap().len_bytes().unwrap(), 8192);
    });
}

#[test]
fn requests_outlive_a_connection_where_they_may() {
    let dir = tempfile::tempdir().unwrap();
    let disk = new_image(dir.path(), Format::Raw, REGION);
    let other = tempfile::tempdir().unwrap();
    let other = new_image(other.path(), Format::Raw, 2 * REGION);
    let socket = dir.path().join("s");
    let options = || ServeOptions { max_clients: CLIENTS_UNLIMITED, ..ServeOptions::default() };
    // Serves the disk while `work` runs.
    let during = |disk: &Disk, work: &mut dyn FnMut()| {
        let stop = Stop::new().unwrap();
        let listener = Listener::unix(&socket).unwrap();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&listener, disk, &options(), &stop));
            work();
            stop.stop();
            server.join().unwrap().unwrap();
        });
    };
    let mut files = Vec::new();
    during(&disk, &mut || {
        for delay in [0, 1, 600] {
            files.push(NbdFile::connect(&patient(&socket, 0, delay), None).unwrap());
        }
    });
    let [none, short, long] = files.try_into().ok().unwrap();
    let mut room = [0; 512];
    let lost = |file: &NbdFile| file.write_at(0, &WriteBufs::from_slice(&[1; 512])).unwrap_err().kind();
    assert_eq!((lost(&none), lost(&short)), (ErrorKind::ConnectionAborted, ErrorKind::ConnectionAborted));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| exercise(&long, 0, &mut Rng(5), 400));
        for _ in 0..5 {
            during(&disk, &mut || drop(NbdFile::connect(&patient(&socket, 0, 0), None).unwrap()));
        }
        during(&disk, &mut || {
            while !writer.is_finished() {
                std::thread::yield_now()
            }
        });
        let model = writer.join().unwrap();
        let mut found = vec![0; REGION as usize];
        disk.read(0, &mut found).unwrap();
        assert!(found == model);
    });
    // After a while a request comes back to a server that came late, and never to another export.
    during(&disk, &mut || short.read_at(0, &ReadBufs::from_slice(&mut room)).unwrap());
    assert_eq!(lost(&none), ErrorKind::ConnectionAborted);
    during(&other, &mut || assert_eq!(lost(&short), ErrorKind::ConnectionAborted));
}

/// Answers no read before so many are there.
struct Together {
    wanted: usize,
    count: Mutex<usize>,
    changed: Condvar,
}

impl ReadBackend for Together {
    fn read_at(&self, _: u64, bufs: &ReadBufs<'_>) -> std::io::Result<()> {
        let mut count = self.count.lock().unwrap();
        *count += 1;
        self.changed.notify_all();
        let is_alone = |count: &mut usize| *count < self.wanted;
        let waited = self.changed.wait_timeout_while(count, Duration::from_secs(60), is_alone).unwrap().1;
        bufs.fill_zero();
        if waited.timed_out() { Err(ErrorKind::TimedOut.into()) } else { Ok(()) }
    }

    fn len_bytes(&self) -> std::io::Result<u64> {
        Ok(REGION)
    }

    fn allocated_bytes(&self) -> std::io::Result<u64> {
        Ok(REGION)
    }
}

#[test]
fn requests_of_many_threads_are_in_flight_together() {
    const MANY: usize = 16;
    let together = Together { wanted: MANY, count: Mutex::new(0), changed: Condvar::new() };
    let layer = ChainBackend {
        file: Box::new(ReadOnly(together)),
        path_label: "together".into(),
        format: Format::Raw,
        extents: Vec::new(),
    };
    let open = OpenOptions { read_only: true, format: Format::Raw, ..OpenOptions::default() };
    let disk = Disk::open_backends(vec![layer], &open).unwrap();
    let served = Served::new(disk, ServeOptions { workers: MANY, ..ServeOptions::default() });
    let file = served.connect().unwrap();
    std::thread::scope(|scope| {
        for index in 0..MANY as u64 {
            let file = &file;
            scope.spawn(move || file.read_at(index * 4096, &ReadBufs::from_slice(&mut [0; 4096])).unwrap());
        }
    });
}
