//! What requests to the file below blkdebug may look like, and how others are cut and padded. Pure.
//!
//! The cuts are those that QEMU's block layer makes above a driver with such limits (`bdrv_co_do_pwrite_zeroes` and
//! `bdrv_co_pdiscard` in `block/io.c`).

use std::iter::from_fn;
use std::ops::Range;

use thiserror::Error;

/// Values from here on are refused.
const VALUE_END: u64 = i32::MAX as u64;
/// Most bytes of zeroes that are written as data at once.
const ZEROES_MAX_BYTES: u64 = 16 << 20;

/// Limits of a file below blkdebug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offset and length of every request are multiples of this: a power of two, at least 1.
    align: u64,
    /// Most bytes of one read or write; the others below likewise. A multiple of `align`.
    max_transfer: u64,
    /// Unit of requests for zeroes; 0: `align`. What is left of a request beside whole units is written as data.
    opt_write_zero: u64,
    max_write_zero: u64,
    /// Unit of discards; 0: `align`. What is left beside whole units is a request of its own.
    opt_discard: u64,
    max_discard: u64,
}

/// A limit that cannot hold, by itself or with those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("Cannot meet constraints with {option} {value}")]
pub struct LimitError {
    /// Its name.
    pub option: &'static str,
    /// What it was to be, in bytes.
    pub value: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        let [max_transfer, max_write_zero, max_discard] = [u64::MAX; 3];
        Limits { align: 1, max_transfer, opt_write_zero: 0, max_write_zero, opt_discard: 0, max_discard }
    }
}

/// A part of a request for zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroCut {
    /// A request for zeroes.
    Zeroes(u64, u64),
    /// Zeroes to be written as data.
    Data(u64, u64),
}

impl Limits {
    /// The names of the limits, in the order in which [`Limits::new`] takes and checks them.
    pub const OPTIONS: [&str; 6] =
        ["align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard"];

    /// Limits in bytes; 0 means that there is none. Each is less than `i32::MAX` and a multiple of `align`, which is a
    /// power of two; the largest request is a multiple of the unit too.
    pub fn new(values: [u64; 6]) -> Result<Limits, LimitError> {
        let [align, max_transfer, opt_write_zero, max_write_zero, opt_discard, max_discard] = values;
        let unit = align.max(1);
        let fits = [
            unit.is_power_of_two(),
            max_transfer.is_multiple_of(unit),
            opt_write_zero.is_multiple_of(unit),
            max_write_zero.is_multiple_of(opt_write_zero.max(unit)),
            opt_discard.is_multiple_of(unit),
            max_discard.is_multiple_of(opt_discard.max(unit)),
        ];
        for ((option, value), fits) in Limits::OPTIONS.into_iter().zip(values).zip(fits) {
            if !fits || value >= VALUE_END {
                return Err(LimitError { option, value });
            }
        }
        let or_none = |value: u64| if value == 0 { u64::MAX } else { value };
        Ok(Limits {
            align: unit,
            max_transfer: or_none(max_transfer),
            opt_write_zero,
            max_write_zero: or_none(max_write_zero),
            opt_discard,
            max_discard: or_none(max_discard),
        })
    }

    /// What offset and length of every request are multiples of, in bytes.
    pub fn align(&self) -> u64 {
        self.align
    }

    /// The range with all of the aligned blocks that it touches.
    pub(super) fn padded(&self, offset: u64, bytes: u64) -> Range<u64> {
        let start = offset - offset % self.align;
        // Behind the last block there is nothing: the file below refuses that.
        start..offset.saturating_add(bytes).checked_next_multiple_of(self.align).unwrap_or(u64::MAX)
    }

    /// Offset and length of the pieces of a read or write that is aligned, relative to its start.
    pub(super) fn transfers(&self, bytes: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let piece = usize::try_from(self.max_transfer).unwrap_or(usize::MAX);
        (0..bytes).step_by(piece).map(move |at| (at, piece.min(bytes - at)))
    }

    /// The cuts of a request for zeroes that is aligned.
    pub(super) fn zeroes(&self, offset: u64, bytes: u64) -> impl Iterator<Item = ZeroCut> + use<> {
        let unit = self.opt_write_zero.max(self.align);
        let data_max = self.max_transfer.min(ZEROES_MAX_BYTES);
        let zeroes_max = self.max_write_zero - self.max_write_zero % unit;
        let end = offset.saturating_add(bytes);
        let mut at = offset;
        from_fn(move || {
            let left = end.saturating_sub(at);
            let within = at % unit;
            let cut = match left {
                0 => return None,
                _ if within > 0 => ZeroCut::Data(at, left.min(unit - within).min(data_max)),
                _ if left < unit => ZeroCut::Data(at, left.min(data_max)),
                _ => ZeroCut::Zeroes(at, (left - left % unit).min(zeroes_max)),
            };
            let (ZeroCut::Zeroes(_, bytes) | ZeroCut::Data(_, bytes)) = cut;
            at += bytes;
            Some(cut)
        })
    }

    /// Offset and length of the requests of a discard. What is less than an aligned block is left out: it stays as it is.
    pub(super) fn discards(&self, offset: u64, bytes: u64) -> impl Iterator<Item = (u64, u64)> + use<> {
        let Limits { align, .. } = *self;
        let unit = self.opt_discard.max(align);
        let max = self.max_discard - self.max_discard % unit;
        let end = offset.saturating_add(bytes);
        let mut at = offset;
        let cut = move || {
            let left = end.saturating_sub(at);
            let within = at % unit;
            let now = match left {
                0 => return None,
                // Up to the next aligned block, and from there up to the next unit.
                _ if within > 0 => left.min(unit - within),
                _ if left >= unit => (left - left % unit).min(max),
                _ => left,
            };
            // The part of a block comes by itself: first at the start, last at the end.
            let ragged = now % align;
            let now = match ragged {
                0 => now,
                _ if within > 0 || now < align => ragged,
                _ => now - ragged,
            };
            at += now;
            Some((at - now, now))
        };
        from_fn(cut).filter(move |(at, bytes)| at.is_multiple_of(align) && bytes.is_multiple_of(align))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(values: [u64; 6]) -> Limits {
        Limits::new(values).unwrap()
    }

    #[test]
    fn limits_must_go_together() {
        // What qemu-io 10.0.2 says of the same values.
        for (values, want) in [
            ([3, 0, 0, 0, 0, 0], Some(("align", 3))),
            ([1 << 31, 0, 0, 0, 0, 0], Some(("align", 1 << 31))),
            ([1 << 30, 0, 0, 0, 0, 0], None),
            ([3, 7, 0, 0, 0, 0], Some(("align", 3))),
            ([0, 3, 0, 0, 0, 0], None),
            ([0, VALUE_END, 0, 0, 0, 0], Some(("max-transfer", VALUE_END))),
            ([512, 1000, 0, 0, 0, 0], Some(("max-transfer", 1000))),
            ([512, 0, 1000, 0, 0, 0], Some(("opt-write-zero", 1000))),
            ([512, 0, 4096, 2048, 0, 0], Some(("max-write-zero", 2048))),
            ([0, 0, 1000, 1500, 0, 0], Some(("max-write-zero", 1500))),
            ([512, 0, 0, 0, 1000, 0], Some(("opt-discard", 1000))),
            ([0, 0, 0, 0, 2048, 2049], Some(("max-discard", 2049))),
            ([512, 0, 15 << 20, 15 << 20, 15 << 20, 15 << 20], None),
        ] {
            let error = Limits::new(values).err().map(|LimitError { option, value }| (option, value));
            assert_eq!(error, want, "{values:?}");
        }
    }

    #[test]
    fn zeroes_go_as_units_between_data() {
        use ZeroCut::{Data, Zeroes};
        let cuts = |values, offset, bytes| limits(values).zeroes(offset, bytes).collect::<Vec<_>>();
        assert_eq!(Limits::default().zeroes(3, 1 << 40).collect::<Vec<_>>(), [Zeroes(3, 1 << 40)]);
        let values = [512, 1024, 4096, 8192, 0, 0];
        assert_eq!(cuts(values, 0, 0), []);
        assert_eq!(cuts(values, 512, 1024), [Data(512, 1024)]);
        assert_eq!(
            cuts(values, 2560, 22016),
            [Data(2560, 1024), Data(3584, 512), Zeroes(4096, 8192), Zeroes(12288, 8192), Zeroes(20480, 4096)]
        );
        assert_eq!(cuts(values, 4096, 5632), [Zeroes(4096, 4096), Data(8192, 1024), Data(9216, 512)]);
        // A unit that is no power of two.
        assert_eq!(cuts([0, 0, 1000, 1000, 0, 0], 2500, 1600), [Data(2500, 500), Zeroes(3000, 1000), Data(4000, 100)]);
    }

    #[test]
    fn discards_are_cut_at_units_and_lose_parts_of_blocks() {
        let cuts = |values, offset, bytes| limits(values).discards(offset, bytes).collect::<Vec<_>>();
        assert_eq!(cuts([0; 6], 5, 1 << 40), [(5, 1 << 40)]);
        let values = [512, 0, 0, 0, 4096, 8192];
        assert_eq!(cuts(values, 100, 300), []);
        assert_eq!(cuts(values, 500, 524), [(512, 512)]);
        assert_eq!(cuts(values, 3000, 18000), [(3072, 1024), (4096, 8192), (12288, 8192), (20480, 512)]);
        assert_eq!(cuts(values, 4096, 4096 + 700), [(4096, 4096), (8192, 512)]);
    }
}
