//! The wiring of a board: who answers where, which interrupt arrives as what, what a reset leaves behind.

mod support;

use hv_core::{Clock, Gpa, GuestNs, Msi, PowerEvent, VcpuIo};
use machine::{BootSource, DeviceSpec, Entry, Machine, MachineConfig, MachineError};
use support::{Spy, kernel};

struct Zeroes;
impl virtio::RandomSource for Zeroes {
    fn fill(&mut self, buffer: &mut [u8]) -> bool {
        buffer.fill(0);
        true
    }
}

fn config(ram_mib: u64, sources: usize) -> MachineConfig {
    MachineConfig {
        ram_bytes: ram_mib << 20,
        vcpus: 1,
        clock: Clock::virtual_clock(),
        unix_s: 1_767_225_600, // 2026-01-01 00:00:00
        serial: [Some(Box::new(chipset::serial::NoSink)), None, None, None],
        debug_console: None,
        devices: (0..sources).map(|_| DeviceSpec::VirtioRng { source: Box::new(Zeroes) }).collect(),
        boot: BootSource { kernel: kernel(), initrd: None, cmdline: "quiet".into(), entry: Entry::Fastest },
    }
}

fn machine(spy: &Spy) -> Machine {
    let (mut machine, _) = Machine::build(spy, config(32, 2)).unwrap();
    machine.reset().unwrap();
    machine
}

/// Level bit of a message, set in every interrupt that is not a de-assertion. SDM 3A 11.11.2
const ASSERT: u32 = 1 << 14;
const ECAM: u64 = 0xb000_0000;

/// Configuration space of `device` on bus 0, function 0.
fn config_read(machine: &Machine, device: u64, offset: u64, bytes: u8) -> u64 {
    machine.board().mmio_read(Gpa(ECAM + (device << 15) + offset), bytes)
}
fn config_write(machine: &Machine, device: u64, offset: u64, bytes: u8, value: u64) {
    machine.board().mmio_write(Gpa(ECAM + (device << 15) + offset), bytes, value);
}

#[test]
fn holes_read_all_ones_at_every_width() {
    let machine = machine(&Spy::default());
    let board = machine.board();
    for port in [0x0000, 0x2f8, 0x3b0, 0x510, 0xcd8, 0xb000, 0xffff] {
        assert_eq!((board.port_read(port, 1) as u8, board.port_read(port, 2) as u16), (0xff, 0xffff), "{port:#x}");
        assert_eq!(board.port_read(port, 4), u32::MAX, "{port:#x}");
    }
    for gpa in [0xa_0000, 0xafff_fff8, 0xfec0_1000, 0xffff_fff0, 1 << 40] {
        assert_eq!(board.mmio_read(Gpa(gpa), 8), u64::MAX, "{gpa:#x}");
        board.mmio_write(Gpa(gpa), 8, 0);
    }
}

#[test]
fn both_ways_lead_to_the_same_configuration_space() {
    let machine = machine(&Spy::default());
    let board = machine.board();
    let old_way = |device: u32, offset: u32| {
        board.port_write(0xcf8, 4, 1 << 31 | device << 11 | offset & 0xfc);
        board.port_read(0xcfc + (offset & 3) as u16, 2)
    };
    for (device, vendor, id) in [(0, 0x8086, 0x29c0), (1, 0x1af4, 0x1044), (3, 0xffff, 0xffff), (31, 0x8086, 0x2918)] {
        assert_eq!((old_way(device, 0) as u16, old_way(device, 2) as u16), (vendor, id), "device {device}");
        let express = config_read(&machine, device.into(), 0, 4);
        assert_eq!(express as u32, u32::from(id) << 16 | u32::from(vendor), "device {device}");
    }
    // q35 as firmware knows it: the subsystem of the host bridge.
    assert_eq!(config_read(&machine, 0, 0x2c, 4), 0x1100_1af4);
    board.port_write(0xcf8, 4, 0);
    assert_eq!(board.port_read(0xcfc, 4), u32::MAX, "the address register is off");
}

#[test]
fn a_bar_that_moves_takes_its_window_and_its_doorbells_along() {
    let spy = Spy::default();
    let machine = machine(&spy);
    let board = machine.board();
    let base = config_read(&machine, 1, 0x20, 4) & !0xf;
    assert_eq!(board.mmio_read(Gpa(base + 0x12), 2) as u16, 0xffff, "decoding is off");
    assert!(spy.vm().doorbells().is_empty());
    config_write(&machine, 1, 4, 2, 2);
    assert_eq!(board.mmio_read(Gpa(base + 0x12), 2), 1, "one queue");
    let bells = |base: u64| {
        let bells: Vec<u64> = spy.vm().doorbells().iter().map(|bell| bell.address.0 - base).collect();
        bells
    };
    assert_eq!(bells(base), [0x3000]);
    let moved = 0xd000_0000;
    config_write(&machine, 1, 0x20, 4, moved);
    assert_eq!(board.mmio_read(Gpa(base + 0x12), 2) as u16, 0xffff);
    assert_eq!(board.mmio_read(Gpa(moved + 0x12), 2), 1);
    assert_eq!(bells(moved), [0x3000]);
    let rung = board.exits().doorbells;
    board.mmio_write(Gpa(moved + 0x3000), 2, 0);
    assert_eq!(board.exits().doorbells, rung + 1, "the plain write path rings too");
    config_write(&machine, 1, 4, 2, 0);
    assert!(spy.vm().doorbells().is_empty());
    assert_eq!(board.mmio_read(Gpa(moved + 0x12), 2) as u16, 0xffff);
}

#[test]
fn isa_interrupts_reach_the_ioapic_and_the_8259() {
    let spy = Spy::default();
    let machine = machine(&spy);
    let board = machine.board();
    let redirect = |pin: u64, low: u64| {
        board.mmio_write(Gpa(0xfec0_0000), 4, 0x10 + 2 * pin);
        board.mmio_write(Gpa(0xfec0_0010), 4, low);
    };
    // The serial port: interrupt when the transmitter is empty, which it is.
    redirect(4, 0x34);
    board.port_write(0x3fc, 1, 8);
    board.port_write(0x3f9, 1, 2);
    assert_eq!(spy.vm().take_msis(), [Msi { address: 0xfee0_0000, data: ASSERT | 0x34 }]);
    assert_eq!(spy.vm().ioapic_route(4).map(|msi| msi.data & 0xff), Some(0x34));
    // The timer: IRQ 0 is pin 2 there, and pin 0 of the 8259.
    redirect(2, 0x30);
    for (port, value) in [(0x20, 0x11), (0x21, 0x08), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
        board.port_write(port, 1, value);
    }
    for value in [0x34, 0xe8, 0x03] {
        board.port_write(if value == 0x34 { 0x43 } else { 0x40 }, 1, value);
    }
    let due = board.run_due(GuestNs(0)).expect("the timer is armed");
    assert!((GuestNs(800_000)..GuestNs(900_000)).contains(&due), "1000 ticks of 1.193182 MHz: {due:?}");
    board.clock().advance_to(due);
    board.run_due(due);
    assert_eq!(spy.vm().take_msis(), [Msi { address: 0xfee0_0000, data: ASSERT | 0x30 }]);
    assert!(spy.vm().extint());
    assert_eq!((board.pic_ack(), spy.vm().extint(), board.pic_ack()), (Some(8), false, None));
}

#[test]
fn power_events_arrive_from_every_register_that_makes_one() {
    for (port, bytes, value, event) in [
        (0x604, 2, 0x3c00, Some(PowerEvent::PowerOff)),
        (0x604, 2, 0x3400, None), // another sleep state
        (0xcf9, 1, 0x06, Some(PowerEvent::Reset)),
        (0xcf9, 1, 0x02, None),
        (0x92, 1, 0x01, Some(PowerEvent::Reset)),
        (0x64, 1, 0xfe, Some(PowerEvent::Reset)),
        (0x505, 1, 0x01, Some(PowerEvent::Panicked)),
    ] {
        let machine = machine(&Spy::default());
        machine.board().port_write(port, bytes, value);
        assert_eq!(machine.power().take(), event, "{port:#x} = {value:#x}");
    }
}

#[test]
fn a_reset_brings_everything_back() {
    let spy = Spy::default();
    let mut machine = machine(&spy);
    let board = machine.board().clone();
    let base = config_read(&machine, 1, 0x20, 4);
    config_write(&machine, 1, 4, 2, 2);
    config_write(&machine, 1, 0x20, 4, 0xd000_0000);
    board.port_write(0x43, 1, 0x34);
    board.port_write(0x40, 1, 1);
    board.port_write(0x40, 1, 1);
    board.port_write(0x3f9, 1, 2);
    machine.ram().write(Gpa(0x10_0000), &[0xcc]).unwrap();
    let states = machine.reset().unwrap();
    assert_eq!((states.len(), states[0].rip, states[0].cr0), (1, 0x10_0000, 0x11));
    assert_eq!((config_read(&machine, 1, 0x20, 4), config_read(&machine, 1, 4, 2)), (base, 0));
    assert_eq!(board.run_due(board.clock().now()), None, "no timer is armed");
    assert_eq!(board.port_read(0x3f9, 1) as u8, 0);
    let mut first = [0];
    machine.ram().read(Gpa(0x10_0000), &mut first).unwrap();
    assert_eq!(first, [0xf4], "the kernel is loaded anew");
}

#[test]
fn what_does_not_fit_is_refused_with_its_numbers() {
    let build = |config| Machine::build(&Spy::default(), config).map(|_| ()).unwrap_err();
    assert!(matches!(build(config(31, 0)), MachineError::MemorySize { .. }));
    assert!(matches!(build(config(1 << 30, 0)), MachineError::MemoryBeyond { physical_bits: 46, .. }));
    assert!(matches!(build(config(32, 31)), MachineError::TooManyDevices { count: 31, slots: 30 }));
    assert!(matches!(build(MachineConfig { vcpus: 0, ..config(32, 0) }), MachineError::NoVcpu));
}
