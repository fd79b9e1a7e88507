//! How qemu-io prints amounts, times and bytes.

use std::io::Write;
use std::time::Duration;

use crate::output::stdout;

/// A number of bytes with a binary unit; three digits behind the point, or none.
pub fn amount(bytes: f64) -> String {
    const UNITS: [&str; 6] = ["EiB", "PiB", "TiB", "GiB", "MiB", "KiB"];
    for (index, unit) in UNITS.iter().enumerate() {
        let one = 1024f64.powi(6 - index as i32);
        if bytes >= one {
            return number(bytes / one) + " " + unit;
        }
    }
    number(bytes) + " bytes"
}

fn number(value: f64) -> String {
    format!("{value:.3}").replace(".000", "")
}

/// What a request did, and how long it took.
pub struct Done<'a> {
    /// `read`, `wrote`, `discard`.
    pub verb: &'a str,
    /// Where it started.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
    /// For programs: one line of numbers.
    pub machine: bool,
}

impl Done<'_> {
    /// Prints it; output that nobody takes stops no work.
    pub fn print(&self) {
        let _ = self.write();
    }

    fn write(&self) -> std::io::Result<()> {
        let Done { verb, offset, bytes, took, machine } = self;
        let seconds = took.as_secs_f64().max(1e-9);
        let (rate, requests) = (*bytes as f64 / seconds, 1.0 / seconds);
        let mut out = stdout();
        if *machine {
            return writeln!(out, "{bytes},1,{},{rate:.3},{requests:.3}", clock(*took, true));
        }
        writeln!(out, "{verb} {bytes}/{bytes} bytes at offset {offset}")?;
        let (all, rate) = (amount(*bytes as f64), amount(rate));
        writeln!(out, "{all}, 1 ops; {} ({rate}/sec and {requests:.4} ops/sec)", clock(*took, false))
    }
}

/// `SS.HH sec`, or hours, minutes and seconds.
fn clock(took: Duration, fixed: bool) -> String {
    let (all, hundredths) = (took.as_secs(), took.subsec_millis() / 10);
    let (hours, minutes, seconds) = (all / 3600, all / 60 % 60, all % 60);
    match (fixed, hours, minutes) {
        (false, 0, 0) => format!("{seconds:02}.{hundredths:02} sec"),
        _ => format!("{hours}:{minutes:02}:{seconds:02}.{hundredths:02}"),
    }
}

/// Sixteen bytes a line, in hexadecimal and as letters.
pub fn dump(offset: u64, bytes: &[u8]) {
    let mut out = stdout();
    for (index, line) in bytes.chunks(16).enumerate() {
        let hex: String = line.iter().map(|byte| format!("{byte:02x} ")).collect();
        let text: String =
            line.iter().map(|byte| if byte.is_ascii_alphanumeric() { char::from(*byte) } else { '.' }).collect();
        let _ = writeln!(out, "{:08x}:  {hex} {text}", offset + index as u64 * 16);
    }
}

#[test]
fn amounts_and_times_are_qemu_io_s() {
    for (bytes, want) in [
        (0.0, "0 bytes"),
        (32.0, "32 bytes"),
        (1536.0, "1.500 KiB"),
        (65536.0, "64 KiB"),
        ((0x11 << 16) as f64, "1.062 MiB"),
        (10737418240.0, "10 GiB"),
    ] {
        assert_eq!(amount(bytes), want);
    }
    for (millis, fixed, want) in [
        (0, false, "00.00 sec"),
        (12_340, false, "12.34 sec"),
        (3_723_010, false, "1:02:03.01"),
        (5, true, "0:00:00.00"),
    ] {
        assert_eq!(clock(Duration::from_millis(millis), fixed), want);
    }
}
