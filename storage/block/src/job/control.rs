//! What others see and want of a job: progress, pause, speed, end.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::error::BlockError;

/// What a job is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// It copies.
    Running,
    /// It waits for [`JobControl::resume`].
    Paused,
    /// The target follows the disk; [`JobControl::complete`] or [`JobControl::cancel`] ends it.
    Ready,
    /// It has ended.
    Ended,
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobStatus {
    /// What it does.
    pub state: JobState,
    /// Bytes dealt with.
    pub done_bytes: u64,
    /// Bytes to deal with in all; it may grow while a guest writes.
    pub total_bytes: u64,
    /// Most bytes a second; 0: no bound.
    pub bytes_per_second: u64,
}

/// How a job shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Cancel,
    Complete,
}

struct Inner {
    paused: bool,
    ready: bool,
    ended: bool,
    end: Option<End>,
    done_bytes: u64,
    total_bytes: u64,
    pace: Pace,
}

/// The handle of a job: shared between the thread that runs it and those who watch it.
pub struct JobControl {
    inner: Mutex<Inner>,
    changed: Condvar,
    started: Instant,
}

impl Default for JobControl {
    fn default() -> JobControl {
        JobControl::new(0)
    }
}

impl JobControl {
    /// For a job that moves at most so many bytes a second; 0: no bound.
    pub fn new(bytes_per_second: u64) -> JobControl {
        let pace = Pace { bytes_per_second, free_at: Duration::ZERO };
        let inner = Inner { paused: false, ready: false, ended: false, end: None, done_bytes: 0, total_bytes: 0, pace };
        JobControl { inner: Mutex::new(inner), changed: Condvar::new(), started: Instant::now() }
    }

    /// How far it is.
    pub fn status(&self) -> JobStatus {
        let inner = self.inner.lock();
        let state = match () {
            () if inner.ended => JobState::Ended,
            () if inner.paused => JobState::Paused,
            () if inner.ready => JobState::Ready,
            () => JobState::Running,
        };
        let Inner { done_bytes, total_bytes, .. } = *inner;
        JobStatus { state, done_bytes, total_bytes, bytes_per_second: inner.pace.bytes_per_second }
    }

    /// Stops copying until [`JobControl::resume`]. What keeps up with a guest's writes goes on.
    pub fn pause(&self) {
        self.set(|inner| inner.paused = true);
    }

    /// Goes on.
    pub fn resume(&self) {
        self.set(|inner| inner.paused = false);
    }

    /// Bounds what is moved in a second; 0: no bound.
    pub fn set_speed(&self, bytes_per_second: u64) {
        self.set(|inner| inner.pace = Pace { bytes_per_second, free_at: Duration::ZERO });
    }

    /// Ends the job and leaves the disk on the layers it has.
    pub fn cancel(&self) {
        self.set(|inner| inner.end = Some(End::Cancel));
    }

    /// Lets a job that is ready end with the disk on its target.
    pub fn complete(&self) {
        self.set(|inner| {
            inner.end.get_or_insert(End::Complete);
        });
    }

    /// Waits until the job is ready or has ended; `false`: it has ended.
    pub fn wait_until_ready(&self) -> bool {
        let mut inner = self.inner.lock();
        while !inner.ready && !inner.ended {
            self.changed.wait(&mut inner);
        }
        !inner.ended
    }

    fn set(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner.lock());
        self.changed.notify_all();
    }

    /// There is more to deal with.
    pub(super) fn add_total(&self, bytes: u64) {
        self.inner.lock().total_bytes += bytes;
    }

    /// So many bytes are dealt with, `moved` of them by copying. Waits while the job is paused or ahead of its speed.
    pub(super) fn advance(&self, bytes: u64, moved: u64) -> Result<(), BlockError> {
        let mut inner = self.inner.lock();
        inner.done_bytes += bytes;
        let mut free_at = inner.pace.after(self.started.elapsed(), moved);
        loop {
            if inner.end == Some(End::Cancel) {
                return Err(BlockError::Stopped);
            }
            if inner.paused {
                self.changed.wait(&mut inner);
            } else if self.started.elapsed() < free_at {
                self.changed.wait_until(&mut inner, self.started + free_at);
            } else {
                return Ok(());
            }
            // A new speed forgets what the old one owed.
            free_at = free_at.min(inner.pace.free_at);
        }
    }

    /// The target has caught up. Waits until someone wants an end or `has_work`, which is asked under the lock that
    /// [`JobControl::wake`] takes; `None`: there is work.
    pub(super) fn idle(&self, has_work: impl Fn() -> bool) -> Option<End> {
        let mut inner = self.inner.lock();
        if !inner.ready {
            inner.ready = true;
            self.changed.notify_all();
        }
        loop {
            match inner.end {
                Some(end) => return Some(end),
                None if !inner.paused && has_work() => return None,
                None => self.changed.wait(&mut inner),
            }
        }
    }

    /// There may be work for a job that is idle.
    pub(super) fn wake(&self) {
        let inner: MutexGuard<'_, Inner> = self.inner.lock();
        if inner.ready {
            self.changed.notify_all();
        }
    }

    /// The job has ended, however.
    pub(super) fn ended(&self) {
        self.set(|inner| inner.ended = true);
    }
}

/// A bound of bytes in a second, over a clock that the caller reads.
struct Pace {
    bytes_per_second: u64,
    /// When the next bytes may move.
    free_at: Duration,
}

impl Pace {
    /// Counts bytes moved at `now`; returns when the next ones may move.
    fn after(&mut self, now: Duration, bytes: u64) -> Duration {
        if self.bytes_per_second == 0 {
            return Duration::ZERO;
        }
        let took = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let took = Duration::from_nanos(u64::try_from(took).unwrap_or(u64::MAX));
        self.free_at = self.free_at.max(now).saturating_add(took);
        self.free_at
    }
}

#[test]
fn bytes_move_at_their_speed() {
    let mut pace = Pace { bytes_per_second: 1000, free_at: Duration::ZERO };
    let ms = Duration::from_millis;
    // Moved at, bytes, and when the next ones may move: time that passed unused is not saved up.
    for (now, bytes, free) in [(0, 500, 500), (500, 100, 600), (550, 0, 600), (2000, 250, 2250), (2250, 1000, 3250)] {
        assert_eq!(pace.after(ms(now), bytes), ms(free), "{bytes} at {now}");
    }
    pace.bytes_per_second = 0;
    assert_eq!(pace.after(ms(9), 1 << 40), Duration::ZERO);
}
