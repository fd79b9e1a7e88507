//! Guest time in the ticks of an oscillator.

use hv_core::GuestNs;

const NS_PER_S: u128 = 1_000_000_000;

/// Whole ticks of `hz` in `ns` nanoseconds.
pub(crate) fn from_ns(ns: u64, hz: u64) -> u64 {
    (u128::from(ns) * u128::from(hz) / NS_PER_S) as u64
}

/// The first nanosecond at which [`from_ns`] shows `ticks`; [`GuestNs::NEVER`] when that is beyond the clock.
pub(crate) fn to_ns(ticks: u64, hz: u64) -> GuestNs {
    let ns = (u128::from(ticks) * NS_PER_S).div_ceil(u128::from(hz));
    GuestNs(u64::try_from(ns).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_is_visible_exactly_when_its_deadline_has_come() {
        for hz in [32_768, 1_193_182, 3_579_545, 100_000_000] {
            for ticks in [1, 2, 3, 65_535, 65_536, 1 << 40] {
                let GuestNs(ns) = to_ns(ticks, hz);
                assert_eq!((from_ns(ns, hz), from_ns(ns - 1, hz)), (ticks, ticks - 1), "{ticks} ticks of {hz} Hz");
            }
        }
        assert_eq!(to_ns(u64::MAX, 1), GuestNs::NEVER);
    }
}
