//! The PCI transport, which is the same for every device: capabilities, negotiation, interrupts. Driven by the source of
//! random bytes, which has one queue and no configuration. Offsets are those of VIRTIO 4.1.4.3, numbers those of the
//! chapters named.

use pci::PciFunction;

use crate::RandomSource;
use crate::rng::{Rng, model};
use crate::testing::{DATA, RING_FEATURES, Rig, WRITE_ONLY, twice};

struct Sevens;
impl RandomSource for Sevens {
    fn fill(&mut self, buffer: &mut [u8]) -> bool {
        buffer.fill(7);
        true
    }
}

fn rig(reload: bool) -> Rig {
    Rig::new(reload, || (model(), Rng::new(Box::new(Sevens))))
}
const BUFFER: &[(u64, u32, u16)] = &[(DATA, 16, WRITE_ONLY)];
const MSIX_BAR: u8 = 1;

/// Offset and identifier of every capability.
fn capabilities(rig: &mut Rig) -> Vec<(u8, u32)> {
    let function = rig.function();
    let mut at = function.config_read(0x34, 1) as u8;
    let mut found = Vec::new();
    while at != 0 {
        found.push((at, function.config_read(at, 1)));
        at = function.config_read(at + 1, 1) as u8;
    }
    found
}
fn msix_control(rig: &mut Rig, value: u32) {
    let (at, _) = capabilities(rig).into_iter().find(|&(_, id)| id == 0x11).unwrap();
    rig.function().config_write(at + 2, 2, value);
}

#[test]
fn capabilities_say_where_the_registers_are() {
    let mut rig = rig(false);
    let found = capabilities(&mut rig);
    let function = rig.function();
    // cfg_type, BAR, offset, length. VIRTIO 4.1.4
    let mut vendor: Vec<_> = found
        .iter()
        .filter(|&&(_, id)| id == 9)
        .map(|&(at, _)| {
            [at + 3, at + 4]
                .map(|o| function.config_read(o, 1))
                .into_iter()
                .chain([at + 8, at + 12].map(|o| function.config_read(o, 4)))
                .collect::<Vec<u32>>()
        })
        .collect();
    vendor.sort();
    assert_eq!(vendor, [[1, 4, 0, 0x3c], [2, 4, 0x3000, 4], [3, 4, 0x1000, 1], [4, 4, 0x2000, 0x1000], [5, 4, 0, 0]]);
    let notify = found.iter().find(|&&(at, id)| id == 9 && function.config_read(at + 3, 1) == 2).unwrap().0;
    assert_eq!(function.config_read(notify + 16, 4), 4, "bytes between doorbells");
    // PCI 6.8.2: two vectors, table at 0 of BAR 1, pending bits behind it.
    let msix = found.iter().find(|&&(_, id)| id == 0x11).unwrap().0;
    assert_eq!([msix + 4, msix + 8].map(|o| function.config_read(o, 4)), [1, 0x801]);
    assert_eq!(function.config_read(msix + 2, 2) & 0x7ff, 1);
    assert_eq!([0, 2].map(|o| function.config_read(o, 2)), [0x1af4, 0x1044]);
}

#[test]
fn features_are_accepted_only_as_they_were_offered() {
    // Driver features by halves, what becomes of FEATURES_OK (8) and DRIVER_OK (4). VIRTIO 3.1.1, 6.1
    for (low, high, status) in [(0, 1, 0xf), (0, 0, 3), (1, 1, 3), (0, 3, 3)] {
        twice(|reload| {
            let mut rig = rig(reload);
            rig.write(0x14, 1, 1);
            rig.write(0x14, 1, 3);
            for (half, value) in [(0, low), (1, high)] {
                rig.write(8, 4, half);
                rig.write(0xc, 4, value);
                assert_eq!(rig.read(0xc, 4), value);
            }
            rig.write(0x14, 1, 11);
            rig.write(0x14, 1, 15);
            assert_eq!(rig.read(0x14, 1), status, "{low:#x} {high:#x}");
            // What was accepted is fixed.
            rig.write(0xc, 4, 0x10);
            assert_eq!(rig.read(0xc, 4), if status == 0xf { high } else { 0x10 });
        });
    }
}

#[test]
fn a_device_reset_forgets_the_driver() {
    twice(|reload| {
        let mut rig = rig(reload);
        rig.start(1, 0);
        rig.offer(0, BUFFER);
        rig.write(0x14, 1, 0);
        assert_eq!(rig.read(0x14, 1), 0);
        let registers = [(0, 4), (8, 4), (0xc, 4), (0x16, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8)];
        for (offset, bytes) in registers {
            assert_eq!(rig.read(offset, bytes), 0, "{offset:#x}");
        }
        assert_eq!([0x10, 0x1a].map(|offset| rig.read(offset, 2)), [0xffff, 0xffff], "no vector");
        rig.messages();
        rig.offer(0, BUFFER);
        assert!(rig.messages().is_empty(), "nothing is served");
    });
}

#[test]
fn a_driver_after_a_reset_begins_at_the_start_of_its_rings() {
    // Of the machine, or of the device by a driver that does not wait until the status reads 0.
    for machine in [true, false] {
        twice(|reload| {
            let mut rig = rig(reload);
            rig.start(1, 0);
            for _ in 0..3 {
                rig.offer(0, BUFFER);
                assert_eq!(rig.used(0), Some(16));
            }
            match machine {
                true => rig.reset_machine(),
                false => rig.write(0x14, 1, 0),
            }
            rig.put(0x1000, &[0; 0x2000]);
            rig.messages();
            rig.start(1, 0);
            rig.offer(0, BUFFER);
            assert_eq!((rig.used(0), rig.messages()), (Some(16), vec![0x41]));
        });
    }
}

#[test]
fn a_queue_is_set_up_once_and_its_numbers_are_checked() {
    twice(|reload| {
        let mut rig = rig(reload);
        let most = rig.read(0x18, 2);
        for (size, becomes) in [(3, most), (0, most), (2 * most, most), (4, 4)] {
            rig.write(0x18, 2, size);
            assert_eq!(rig.read(0x18, 2), becomes, "queue size {size}");
        }
        for (vector, becomes) in [(1, 1), (2, 0xffff), (0xffff, 0xffff)] {
            rig.write(0x1a, 2, vector);
            assert_eq!(rig.read(0x1a, 2), becomes, "vector {vector}");
        }
        rig.write(0x20, 4, 0x2000);
        rig.write(0x24, 4, 1);
        assert_eq!((rig.read(0x20, 8), rig.read(0x24, 4)), (0x1_0000_2000, 1));
        rig.write(0x1c, 2, 1);
        rig.write(0x20, 8, 0);
        rig.write(0x18, 2, 2);
        assert_eq!((rig.read(0x20, 8), rig.read(0x18, 2)), (0x1_0000_2000, 4), "it is in use");
        rig.write(0x16, 2, 1);
        assert_eq!([0x18, 0x1c].map(|offset| rig.read(offset, 2)), [0, 0], "there is one queue");
    });
}

#[test]
fn without_msi_x_the_status_register_says_why_and_is_cleared_by_reading() {
    twice(|reload| {
        let mut rig = rig(reload);
        msix_control(&mut rig, 0);
        rig.start(1, 0);
        rig.offer(0, BUFFER);
        assert_eq!((rig.used(0), rig.messages()), (Some(16), vec![]));
        let interrupt_status = |rig: &mut Rig| rig.function().config_read(6, 2) & 8;
        assert_eq!(interrupt_status(&mut rig), 8);
        assert_eq!((rig.read(0x1000, 1), interrupt_status(&mut rig), rig.read(0x1000, 1)), (1, 0, 0));
    });
}

#[test]
fn a_masked_vector_waits_in_its_pending_bit() {
    twice(|reload| {
        for function_mask in [false, true] {
            let mut rig = rig(reload);
            rig.start(1, 0);
            let mask = |rig: &mut Rig, on: bool| match function_mask {
                true => msix_control(rig, if on { 0xc000 } else { 0x8000 }),
                false => rig.function().window_write(MSIX_BAR, 0x1c, 4, on.into()),
            };
            mask(&mut rig, true);
            rig.offer(0, BUFFER);
            assert_eq!((rig.used(0), rig.messages()), (Some(16), vec![]));
            assert_eq!(rig.function().window_read(MSIX_BAR, 0x800, 4), 2);
            mask(&mut rig, false);
            assert_eq!((rig.messages(), rig.function().window_read(MSIX_BAR, 0x800, 4)), (vec![0x41], 0));
        }
    });
}

#[test]
fn interrupts_come_only_when_the_driver_asks_for_them() {
    twice(|reload| {
        // With EVENT_IDX: the driver waits for the third buffer, the flag means nothing.
        let [with_event_idx, without] = RING_FEATURES;
        let mut rig = rig(reload);
        rig.start(1, with_event_idx);
        for (flags, told) in [(1, vec![]), (0, vec![]), (1, vec![0x41]), (0, vec![])] {
            rig.offer_quietly(0, BUFFER, flags, 2);
            assert_eq!((rig.used(0), rig.messages()), (Some(16), told));
        }
        assert_eq!(rig.available_event(0), 4, "a doorbell is wanted for the next buffer");
        // Without: NO_INTERRUPT in the flags, and the index means nothing.
        rig.write(0x14, 1, 0);
        rig.put(0x1000, &[0; 0x2000]);
        rig.start(1, without);
        for (flags, told) in [(1, vec![]), (0, vec![0x41])] {
            rig.offer_quietly(0, BUFFER, flags, 77);
            assert_eq!((rig.used(0), rig.messages()), (Some(16), told));
        }
    });
}

#[test]
fn the_registers_can_be_reached_through_configuration_space() {
    // VIRTIO 4.1.4.9: BAR at 4, offset at 8, length at 12, data at 16 of the capability.
    let mut rig = rig(false);
    let found = capabilities(&mut rig);
    let function = rig.function();
    let access = found.iter().find(|&&(at, id)| id == 9 && function.config_read(at + 3, 1) == 5).unwrap().0;
    let mut point = |bar: u32, offset: u32, bytes: u32| {
        function.config_write(access + 4, 1, bar);
        function.config_write(access + 8, 4, offset);
        function.config_write(access + 12, 4, bytes);
        function.config_read(access + 16, 4)
    };
    assert_eq!(point(4, 0x12, 2), 1, "number of queues");
    point(4, 0x14, 1);
    function.config_write(access + 16, 1, 3);
    assert_eq!(rig.read(0x14, 1), 3);
    let function = rig.function();
    for (bar, offset, bytes) in [(4u32, 0x13u32, 2u32), (4, 0x4000, 4), (4, 0x12, 3), (1, 0, 4), (4, u32::MAX, 1)] {
        for (at, width, value) in [(4, 1, bar), (8, 4, offset), (12, 4, bytes)] {
            function.config_write(access + at, width, value);
        }
        function.config_write(access + 16, 4, 0xffff_ffff);
        function.config_read(access + 16, 4);
    }
    assert_eq!(rig.read(0x14, 1), 3, "what points nowhere reaches nothing");
}
