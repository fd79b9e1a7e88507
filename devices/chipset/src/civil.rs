//! Dates of the proleptic Gregorian calendar, UTC.

/// A date and time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Civil {
    pub year: i64,
    pub month: u8,
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
    /// 0 is Sunday.
    pub weekday: u8,
}

const DAY_S: i64 = 86_400;

/// Days from 1970-01-01 to the first of `month` in `year`, counted in years that begin in March so that the leap day
/// comes last.
fn days_to_month(year: i64, month: u8) -> i64 {
    let (year, month) = if month <= 2 { (year - 1, i64::from(month) + 9) } else { (year, i64::from(month) - 3) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leap_days + (153 * month + 2) / 5 - 719_468
}

/// Seconds since 1970 of `t`; fields past their range carry over.
pub(crate) fn to_unix(t: &Civil) -> i64 {
    let days = days_to_month(t.year, t.month) + i64::from(t.day) - 1;
    days * DAY_S + i64::from(t.hour) * 3600 + i64::from(t.minute) * 60 + i64::from(t.second)
}

/// The date and time `unix_s` seconds after 1970; clamped to the years 0 to 9999, which is all that two BCD bytes show.
pub(crate) fn from_unix(unix_s: i64) -> Civil {
    let unix_s = unix_s.clamp(days_to_month(0, 1) * DAY_S, days_to_month(10_000, 1) * DAY_S - 1);
    let (days, second) = (unix_s.div_euclid(DAY_S), unix_s.rem_euclid(DAY_S));
    // An estimate that is never late: no year is shorter than 365 days, none longer than 366.
    let mut year = 1970 + days.div_euclid(if days < 0 { 365 } else { 366 });
    while days_to_month(year + 1, 1) <= days {
        year += 1;
    }
    let month = (1..=12).rev().find(|&m| days_to_month(year, m) <= days).unwrap_or(1);
    Civil {
        year,
        month,
        day: (days - days_to_month(year, month) + 1) as u8,
        hour: (second / 3600) as u8,
        minute: (second / 60 % 60) as u8,
        second: (second % 60) as u8,
        weekday: (days + 4).rem_euclid(7) as u8,
    }
}

/// The first second after `unix_s` whose hour, minute and second are the given ones (`None`: any). `None` if no time of
/// day matches.
pub(crate) fn next_match(unix_s: i64, hour: Option<u8>, minute: Option<u8>, second: Option<u8>) -> Option<i64> {
    let differs = |want: Option<u8>, got: i64| want.is_some_and(|w| i64::from(w) != got);
    let mut at = unix_s.checked_add(1)?;
    // A day has 24 hours to skip, an hour 60 minutes, a minute 60 seconds; twice that covers a start in the middle.
    for _ in 0..2 * (24 + 60 + 60) {
        let of_day = at.rem_euclid(DAY_S);
        let skip = if differs(hour, of_day / 3600) {
            3600 - of_day % 3600
        } else if differs(minute, of_day / 60 % 60) {
            60 - of_day % 60
        } else if differs(second, of_day % 60) {
            1
        } else {
            return Some(at);
        };
        at = at.checked_add(skip)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_known_from_elsewhere() {
        // From `date -u -d @N`.
        for (unix_s, year, month, day, hour, minute, second, weekday) in [
            (0, 1970, 1, 1, 0, 0, 0, 4),
            (951_782_399, 2000, 2, 28, 23, 59, 59, 1),
            (951_782_400, 2000, 2, 29, 0, 0, 0, 2),
            (1_709_164_800, 2024, 2, 29, 0, 0, 0, 4),
            (4_107_542_400, 2100, 3, 1, 0, 0, 0, 1),
            (-1, 1969, 12, 31, 23, 59, 59, 3),
        ] {
            let civil = Civil { year, month, day, hour, minute, second, weekday };
            assert_eq!(from_unix(unix_s), civil, "{unix_s}");
            assert_eq!(to_unix(&civil), unix_s);
        }
    }

    #[test]
    fn there_and_back_over_four_centuries() {
        for day in (0..146_097).map(|d| d * DAY_S + d % DAY_S) {
            assert_eq!(to_unix(&from_unix(day)), day);
        }
        assert_eq!(from_unix(i64::MAX).year, 9999);
        assert_eq!(from_unix(i64::MIN).year, 0);
    }

    #[test]
    fn the_next_match_is_found_or_does_not_exist() {
        assert_eq!(next_match(0, None, None, None), Some(1));
        assert_eq!(next_match(0, Some(0), Some(0), Some(0)), Some(DAY_S));
        assert_eq!(next_match(DAY_S - 1, Some(23), Some(59), Some(59)), Some(2 * DAY_S - 1));
        assert_eq!(next_match(0, None, None, Some(61)), None);
        assert_eq!(next_match(i64::MAX, None, None, None), None);
    }
}
