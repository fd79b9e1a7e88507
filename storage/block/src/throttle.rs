//! Limits on what a disk may do: leaky buckets that fill with each transfer and drain with time.
//!
//! Every limit has a bucket. A transfer goes at once while none of its buckets is too full, and is then added to them; so
//! a bucket may overflow by one transfer, and the next one waits until that has drained. A burst rate makes the bucket as
//! large as what the burst may move; while it lasts a second, small bucket that drains at the burst rate holds the speed.
//! The rules and the numbers are those of QEMU ("I/O throttling", `docs/throttle.txt`).
//!
//! Nothing here waits or looks at a clock: time is an argument in nanoseconds from any start, and the answer is "now" or
//! "at this time". One [`Throttle`] may have several members (disks of one group, or queues of one disk), which are served
//! in the order in which they began to wait.

use std::collections::VecDeque;

/// The largest value of any limit.
pub const LIMIT_MAX: u64 = 1_000_000_000_000_000;

const NS_PER_S: f64 = 1e9;
/// A member that has not come back this long after its time loses its place: its device was reset.
const PATIENCE_NS: u64 = 50_000_000;
/// How long one that is not in front gives the one that is.
const TURN_NS: u64 = 100_000;

/// A limit in bytes or requests per second. All zeroes: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// The rate in the long run; 0: unlimited.
    pub rate: u64,
    /// The rate of a burst; 0: none, a tenth of a second at [`Limit::rate`] may be moved at once.
    pub burst_rate: u64,
    /// How long a burst may last in seconds; 0 counts as 1.
    pub burst_s: u64,
}

/// A limit for both directions together and one for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Reads and writes together.
    pub total: Limit,
    /// Reads.
    pub read: Limit,
    /// Writes.
    pub write: Limit,
}

/// Everything that limits a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// Bytes per second.
    pub bytes: Limits,
    /// Requests per second.
    pub requests: Limits,
    /// A request counts as one for every so many bytes of it; 0: as one, whatever its size.
    pub request_bytes: u64,
}

/// Why limits cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ThrottleError {
    /// A total and a direction.
    #[error("bps/iops/max total values and read/write values cannot be used at the same time")]
    TotalAndDirection,
    /// A request size without a limit on requests.
    #[error("iops size requires an iops value to be set")]
    RequestBytesAlone,
    /// A number is out of range.
    #[error("bps/iops/max values must be within [0, {LIMIT_MAX}], not {found}")]
    TooLarge {
        /// It.
        found: u64,
    },
    /// A length of bursts without a rate for them.
    #[error("burst length set without burst rate")]
    BurstLengthAlone,
    /// A burst would move more than can be counted.
    #[error("burst length too high for this burst rate")]
    BurstTooLong,
    /// A burst rate without a rate.
    #[error("bps_max/iops_max require corresponding bps/iops values")]
    BurstAlone,
    /// A burst rate below the rate.
    #[error("bps_max/iops_max cannot be lower than bps/iops")]
    BurstBelowRate,
}

impl Limit {
    fn check(self) -> Result<(), ThrottleError> {
        let Limit { rate, burst_rate, burst_s } = self;
        if let Some(found) = [rate, burst_rate, burst_s].into_iter().find(|value| *value > LIMIT_MAX) {
            return Err(ThrottleError::TooLarge { found });
        }
        match (rate, burst_rate, burst_s) {
            (_, 0, 2..) => Err(ThrottleError::BurstLengthAlone),
            (_, 1.., _) if burst_s > LIMIT_MAX / burst_rate => Err(ThrottleError::BurstTooLong),
            (0, 1.., _) => Err(ThrottleError::BurstAlone),
            (_, 1.., _) if burst_rate < rate => Err(ThrottleError::BurstBelowRate),
            _ => Ok(()),
        }
    }
}

impl Limits {
    fn all(&self) -> [Limit; 3] {
        [self.total, self.read, self.write]
    }
    fn check(&self) -> Result<(), ThrottleError> {
        self.all().into_iter().try_for_each(Limit::check)?;
        let both = |of: fn(Limit) -> u64| of(self.total) > 0 && (of(self.read) > 0 || of(self.write) > 0);
        if both(|limit| limit.rate) || both(|limit| limit.burst_rate) {
            return Err(ThrottleError::TotalAndDirection);
        }
        Ok(())
    }
    fn is_unlimited(&self) -> bool {
        self.all().iter().all(|limit| limit.rate == 0)
    }
}

impl ThrottleLimits {
    /// Whether these limits can be.
    pub fn check(&self) -> Result<(), ThrottleError> {
        self.bytes.check()?;
        self.requests.check()?;
        if self.request_bytes > 0 && self.requests.is_unlimited() {
            return Err(ThrottleError::RequestBytesAlone);
        }
        Ok(())
    }

    /// Whether nothing ever waits.
    pub fn is_unlimited(&self) -> bool {
        self.bytes.is_unlimited() && self.requests.is_unlimited()
    }
}

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    Read,
    /// From the guest.
    Write,
}

/// What a member is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Go on; the transfer has been counted.
    Go,
    /// Ask again at this time. Nothing has been counted.
    At(u64),
}

/// What has been moved and has not drained yet, in units of the limit.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    limit: Limit,
    level: f64,
    burst_level: f64,
}

impl Bucket {
    fn new(limit: Limit) -> Bucket {
        Bucket { limit, ..Bucket::default() }
    }
    fn has_long_bursts(&self) -> bool {
        self.limit.burst_s > 1
    }
    fn drain(&mut self, elapsed_s: f64) {
        self.level = (self.level - self.limit.rate as f64 * elapsed_s).max(0.0);
        if self.has_long_bursts() {
            self.burst_level = (self.burst_level - self.limit.burst_rate as f64 * elapsed_s).max(0.0);
        }
    }
    fn add(&mut self, units: f64) {
        self.level += units;
        if self.has_long_bursts() {
            self.burst_level += units;
        }
    }
    /// Seconds until there is room.
    fn wait_s(&self) -> f64 {
        let Limit { rate, burst_rate, burst_s } = self.limit;
        if rate == 0 {
            return 0.0;
        }
        let size = if burst_rate == 0 { rate as f64 / 10.0 } else { burst_rate as f64 * burst_s.max(1) as f64 };
        if self.level > size {
            return (self.level - size) / rate as f64;
        }
        let burst_size = burst_rate as f64 / 10.0;
        if self.has_long_bursts() && self.burst_level > burst_size {
            return (self.burst_level - burst_size) / burst_rate as f64;
        }
        0.0
    }
}

/// The buckets of one unit.
#[derive(Clone, Copy, Debug, Default)]
struct Buckets {
    total: Bucket,
    read: Bucket,
    write: Bucket,
}

impl Buckets {
    fn new(limits: &Limits) -> Buckets {
        Buckets { total: Bucket::new(limits.total), read: Bucket::new(limits.read), write: Bucket::new(limits.write) }
    }
    /// The two that a transfer goes into.
    fn of(&mut self, direction: Direction) -> [&mut Bucket; 2] {
        match direction {
            Direction::Read => [&mut self.total, &mut self.read],
            Direction::Write => [&mut self.total, &mut self.write],
        }
    }
    fn drain(&mut self, elapsed_s: f64) {
        [&mut self.total, &mut self.read, &mut self.write].into_iter().for_each(|bucket| bucket.drain(elapsed_s));
    }
}

/// A member that waits.
#[derive(Clone, Copy, Debug)]
struct Ticket {
    member: u64,
    /// When it was told to come back.
    due_ns: u64,
}

/// Limits with what has been moved under them.
#[derive(Debug, Default)]
pub struct Throttle {
    limits: ThrottleLimits,
    bytes: Buckets,
    requests: Buckets,
    drained_ns: u64,
    waiting_reads: VecDeque<Ticket>,
    waiting_writes: VecDeque<Ticket>,
}

impl Throttle {
    /// With empty buckets. The limits have been checked.
    pub fn new(limits: ThrottleLimits, now_ns: u64) -> Throttle {
        let mut throttle = Throttle::default();
        throttle.set_limits(limits, now_ns);
        throttle
    }

    /// The limits.
    pub fn limits(&self) -> &ThrottleLimits {
        &self.limits
    }

    /// Changes the limits and empties the buckets. Who waits should ask again at once.
    pub fn set_limits(&mut self, limits: ThrottleLimits, now_ns: u64) {
        self.limits = limits;
        self.bytes = Buckets::new(&limits.bytes);
        self.requests = Buckets::new(&limits.requests);
        self.drained_ns = now_ns;
        self.waiting_reads.clear();
        self.waiting_writes.clear();
    }

    /// Whether `member` may move `bytes` now; it is then counted. A member asks for one transfer of each direction at a
    /// time, and again at the time it was told.
    pub fn admit(&mut self, member: u64, direction: Direction, bytes: u64, now_ns: u64) -> Admission {
        if self.limits.is_unlimited() {
            return Admission::Go;
        }
        self.drain(now_ns);
        let wait_ns = self.wait_ns(direction);
        let waiting = match direction {
            Direction::Read => &mut self.waiting_reads,
            Direction::Write => &mut self.waiting_writes,
        };
        while waiting.front().is_some_and(|t| t.member != member && now_ns > t.due_ns.saturating_add(PATIENCE_NS)) {
            waiting.pop_front();
        }
        let first = waiting.front().is_none_or(|ticket| ticket.member == member);
        let due_ns = match (first, wait_ns, waiting.front()) {
            (true, 0, _) => {
                if waiting.front().is_some() {
                    waiting.pop_front();
                }
                self.count(direction, bytes);
                return Admission::Go;
            }
            // Whoever is in front goes first, and is there no later than that.
            (false, 0, Some(front)) => front.due_ns.max(now_ns.saturating_add(TURN_NS)),
            _ => now_ns.saturating_add(wait_ns),
        };
        match waiting.iter_mut().find(|ticket| ticket.member == member) {
            Some(ticket) => ticket.due_ns = due_ns,
            None => waiting.push_back(Ticket { member, due_ns }),
        }
        Admission::At(due_ns)
    }

    fn drain(&mut self, now_ns: u64) {
        let elapsed_s = now_ns.saturating_sub(self.drained_ns) as f64 / NS_PER_S;
        self.drained_ns = self.drained_ns.max(now_ns);
        self.bytes.drain(elapsed_s);
        self.requests.drain(elapsed_s);
    }

    /// How long a transfer has to wait: until the last of its buckets has room.
    fn wait_ns(&mut self, direction: Direction) -> u64 {
        let buckets = self.bytes.of(direction).into_iter().chain(self.requests.of(direction));
        let wait_s = buckets.map(|bucket| bucket.wait_s()).fold(0.0, f64::max);
        // Rounded up: a timer must not come a moment early and find nothing changed.
        (wait_s * NS_PER_S).ceil() as u64
    }

    fn count(&mut self, direction: Direction, bytes: u64) {
        let unit = self.limits.request_bytes;
        let requests = if unit > 0 && bytes > unit { bytes as f64 / unit as f64 } else { 1.0 };
        self.bytes.of(direction).into_iter().for_each(|bucket| bucket.add(bytes as f64));
        self.requests.of(direction).into_iter().for_each(|bucket| bucket.add(requests));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Direction::{Read, Write};

    const S: u64 = 1_000_000_000;

    fn rate(rate: u64) -> Limit {
        Limit { rate, ..Limit::default() }
    }
    fn total(limit: Limit) -> Limits {
        Limits { total: limit, ..Limits::default() }
    }
    fn bytes(limit: Limit) -> ThrottleLimits {
        ThrottleLimits { bytes: total(limit), ..ThrottleLimits::default() }
    }

    /// Moves transfers of `bytes` one after the other for `seconds`, as fast as they are admitted; how many went.
    fn moved(limits: ThrottleLimits, direction: Direction, bytes: u64, seconds: u64) -> u64 {
        let mut throttle = Throttle::new(limits, 0);
        let (mut now, mut count) = (0, 0);
        while now < seconds * S {
            match throttle.admit(1, direction, bytes, now) {
                Admission::Go => count += 1,
                Admission::At(due) => {
                    assert!(due > now);
                    now = due;
                }
            }
        }
        count
    }

    #[test]
    fn rates_are_kept_over_time() {
        let requests = |limit, request_bytes| ThrottleLimits { requests: limit, request_bytes, ..Default::default() };
        let reads = Limits { read: rate(10), ..Limits::default() };
        // Each starts with an empty bucket: a tenth of a second's worth and one transfer more go at once.
        let cases = [
            (bytes(rate(1_000_000)), Read, 10_000, 10, 1000 + 11),
            (bytes(rate(1_000_000)), Write, 10_000, 10, 1000 + 11),
            // One transfer that is larger than a second's worth.
            (bytes(rate(1000)), Write, 10_000, 100, 10 + 1),
            (requests(total(rate(100)), 0), Read, 1 << 20, 10, 1000 + 11),
            // A request of 16 KiB counts as four.
            (requests(total(rate(100)), 4096), Read, 16384, 10, 250 + 3),
            (requests(total(rate(100)), 4096), Read, 512, 10, 1000 + 11),
            (requests(reads, 0), Read, 512, 10, 100 + 2),
        ];
        for (limits, direction, size, seconds, expected) in cases {
            let count = moved(limits, direction, size, seconds);
            assert!(count.abs_diff(expected) <= 1, "{limits:?}: {count}, not {expected}");
        }
        // The other direction is not limited: everything goes at once.
        let mut throttle = Throttle::new(requests(reads, 0), 0);
        assert!((0..10_000).all(|_| throttle.admit(1, Write, 512, 0) == Admission::Go));
    }

    #[test]
    fn bursts_last_as_long_as_they_may() {
        let burst = |burst_s| bytes(Limit { rate: 1000, burst_rate: 10_000, burst_s });
        // A burst of a second: its bytes at once, then the rate.
        let count = moved(burst(1), Read, 100, 11);
        assert!(count.abs_diff(100 + 110) <= 2, "{count}");
        // A long one moves at its rate until the bucket, which drains meanwhile, is full: 50 000 bytes.
        for (seconds, expected) in [(1, 100), (5, 500), (6, 556), (11, 500 + 110)] {
            let count = moved(burst(5), Read, 100, seconds);
            assert!(count.abs_diff(expected) <= 12, "{seconds} s: {count}, not {expected}");
        }
    }

    #[test]
    fn a_refused_transfer_is_not_counted() {
        let mut throttle = Throttle::new(bytes(rate(1000)), 0);
        assert_eq!(throttle.admit(1, Write, 1100, 0), Admission::Go);
        for _ in 0..100 {
            assert_eq!(throttle.admit(1, Write, 1000, 0), Admission::At(S));
        }
        assert_eq!(throttle.admit(1, Write, 1000, S / 2), Admission::At(S));
        assert_eq!(throttle.admit(1, Write, 1000, S), Admission::Go);
    }

    #[test]
    fn members_of_a_group_take_turns() {
        let mut throttle = Throttle::new(bytes(rate(1000)), 0);
        let mut count = [0; 3];
        let mut due = [0u64; 3];
        let mut now = 0;
        while now < 100 * S {
            for member in 0..3 {
                if due[member] > now {
                    continue;
                }
                match throttle.admit(member as u64, Write, 500, now) {
                    Admission::Go => count[member] += 1,
                    Admission::At(at) => due[member] = at,
                }
            }
            now = due.into_iter().min().unwrap().max(now + 1);
        }
        assert!(count.iter().all(|&count| (66..=68).contains(&count)), "{count:?}");
    }

    #[test]
    fn a_member_that_does_not_come_back_blocks_nobody_for_long() {
        let mut throttle = Throttle::new(bytes(rate(1000)), 0);
        assert_eq!(throttle.admit(1, Write, 1100, 0), Admission::Go);
        assert_eq!(throttle.admit(2, Write, 100, 0), Admission::At(S));
        assert_eq!(throttle.admit(1, Write, 100, 0), Admission::At(S));
        // Member 2 was reset, and is waited for. Reads wait for no write.
        assert_eq!(throttle.admit(1, Write, 100, S), Admission::At(S + TURN_NS));
        assert_eq!(throttle.admit(1, Read, 10, S), Admission::Go);
        assert_eq!(throttle.admit(1, Write, 100, S + PATIENCE_NS + 1), Admission::Go);
    }

    #[test]
    fn new_limits_begin_anew() {
        let mut throttle = Throttle::new(bytes(rate(10)), 0);
        assert_eq!(throttle.admit(1, Write, 1000, 0), Admission::Go);
        assert!(matches!(throttle.admit(1, Write, 1000, 0), Admission::At(_)));
        throttle.set_limits(bytes(rate(20)), 5);
        assert_eq!(throttle.admit(1, Write, 1000, 5), Admission::Go);
        throttle.set_limits(ThrottleLimits::default(), 6);
        assert!((0..100).all(|_| throttle.admit(1, Write, u64::MAX, 6) == Admission::Go));
    }

    #[test]
    fn limits_that_cannot_be_are_refused_as_qemu_refuses_them() {
        use ThrottleError as E;
        let limit = |rate, burst_rate, burst_s| bytes(Limit { rate, burst_rate, burst_s }).check();
        for (rate, burst_rate, burst_s, expected) in [
            (0, 0, 0, Ok(())),
            (5, 10, 5, Ok(())),
            (LIMIT_MAX, LIMIT_MAX, 1, Ok(())),
            (LIMIT_MAX + 1, 0, 0, Err(E::TooLarge { found: LIMIT_MAX + 1 })),
            (5, 0, 2, Err(E::BurstLengthAlone)),
            (5, LIMIT_MAX, 2, Err(E::BurstTooLong)),
            (0, 5, 1, Err(E::BurstAlone)),
            (5, 4, 1, Err(E::BurstBelowRate)),
        ] {
            assert_eq!(limit(rate, burst_rate, burst_s), expected, "{rate} {burst_rate} {burst_s}");
        }
        let both = Limits { total: rate(1), read: rate(1), ..Limits::default() };
        assert_eq!(ThrottleLimits { requests: both, ..Default::default() }.check(), Err(E::TotalAndDirection));
        assert_eq!(ThrottleLimits { request_bytes: 1, ..bytes(rate(1)) }.check(), Err(E::RequestBytesAlone));
    }
}
