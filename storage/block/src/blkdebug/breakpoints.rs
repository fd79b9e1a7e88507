//! Events at which requests stop until somebody lets them go on: `break` and `resume` of `io`.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};

use super::event::Event;

/// What happens to a request that has met a breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It waits.
    Suspended,
    /// It goes on.
    Resuming,
}

/// Is told what happens to a request and its tag, before it does. It is called under a lock: it must not call back.
pub type Watch = Box<dyn Fn(Stop, &str) + Send>;

/// The breakpoints of a file, and the requests that wait at one. A request stops in the thread that makes it, with the
/// locks that it holds there: others that need those wait too, as they do in QEMU.
#[derive(Default)]
pub struct Breakpoints {
    state: Mutex<State>,
    /// How many are set: nothing is locked while there is none.
    set: AtomicUsize,
    /// A request has stopped or goes on, or something else has changed that somebody waits for.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// In the order they were set.
    set: Vec<(Event, String)>,
    /// The one that stopped last at the front: the number of its stop, and the tag.
    stopped: Vec<(u64, String)>,
    next_stop: u64,
    watch: Option<Watch>,
}

impl State {
    fn tell(&self, stop: Stop, tag: &str) {
        if let Some(watch) = &self.watch {
            watch(stop, tag);
        }
    }

    fn resume(&mut self, tag: &str) -> bool {
        let Some(place) = self.stopped.iter().position(|(_, known)| known == tag) else { return false };
        self.tell(Stop::Resuming, tag);
        self.stopped.remove(place);
        true
    }
}

impl Breakpoints {
    /// Names who is told of requests that stop and go on.
    pub fn watch(&self, watch: Watch) {
        self.state.lock().watch = Some(watch);
    }

    /// The next request that comes past the event stops there, once.
    pub fn set(&self, event: Event, tag: &str) {
        let mut state = self.state.lock();
        state.set.push((event, tag.to_owned()));
        self.set.store(state.set.len(), Ordering::Release);
    }

    /// Removes the breakpoints of a tag, and lets all requests go on that stopped at one. `false`: none was set.
    pub fn remove(&self, tag: &str) -> bool {
        let mut state = self.state.lock();
        let before = state.set.len();
        state.set.retain(|(_, known)| known != tag);
        self.set.store(state.set.len(), Ordering::Release);
        while state.resume(tag) {}
        self.changed.notify_all();
        state.set.len() < before
    }

    /// Lets a request go on: of those with the tag, the one that stopped last. `false`: there is none.
    pub fn resume(&self, tag: &str) -> bool {
        let resumed = self.state.lock().resume(tag);
        self.changed.notify_all();
        resumed
    }

    /// Removes all breakpoints and lets every request go on.
    pub fn clear(&self) {
        let mut state = self.state.lock();
        state.set.clear();
        self.set.store(0, Ordering::Release);
        while let Some((_, tag)) = state.stopped.first().cloned() {
            state.resume(&tag);
        }
        self.changed.notify_all();
    }

    /// Waits until `done`, which sees the tags of the requests that wait. It is asked at once, whenever one stops or
    /// goes on, and after [`Breakpoints::look_again`].
    pub fn wait_until(&self, mut done: impl FnMut(&[&str]) -> bool) {
        let mut state = self.state.lock();
        while !done(&state.stopped.iter().map(|(_, tag)| tag.as_str()).collect::<Vec<_>>()) {
            self.changed.wait(&mut state);
        }
    }

    /// Something that a [`Breakpoints::wait_until`] looks at has changed.
    pub fn look_again(&self) {
        // Whoever has just asked, and is about to wait, holds the lock.
        drop(self.state.lock());
        self.changed.notify_all();
    }

    /// A request comes past an event. Returns when nothing holds it any more.
    pub(super) fn pass(&self, event: Event) {
        if self.set.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut state = self.state.lock();
        let first = state.next_stop;
        // The one that was set last stops it first.
        while let Some(place) = state.set.iter().rposition(|(at, _)| *at == event) {
            let (_, tag) = state.set.remove(place);
            state.tell(Stop::Suspended, &tag);
            let stop = state.next_stop;
            state.next_stop += 1;
            state.stopped.insert(0, (stop, tag));
        }
        self.set.store(state.set.len(), Ordering::Release);
        let own = first..state.next_stop;
        if !own.is_empty() {
            self.changed.notify_all();
        }
        while state.stopped.iter().any(|(stop, _)| own.contains(stop)) {
            self.changed.wait(&mut state);
        }
    }
}

#[test]
fn a_request_waits_for_all_of_its_breakpoints() {
    use std::sync::Arc;
    let breakpoints = Breakpoints::default();
    let said = Arc::new(Mutex::new(String::new()));
    let kept = said.clone();
    breakpoints.watch(Box::new(move |stop, tag| *kept.lock() += &format!("{stop:?} {tag}, ")));
    let finished = AtomicUsize::new(0);
    breakpoints.set(Event::WRITE_AIO, "a");
    breakpoints.set(Event::WRITE_AIO, "b");
    breakpoints.set(Event::L2_LOAD, "c");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            breakpoints.pass(Event::READ_AIO);
            breakpoints.pass(Event::WRITE_AIO);
            finished.store(1, Ordering::Relaxed);
            breakpoints.look_again();
            breakpoints.pass(Event::L2_LOAD);
            breakpoints.pass(Event::WRITE_AIO);
        });
        breakpoints.wait_until(|stopped| stopped == ["a", "b"]);
        assert!(breakpoints.resume("a") && !breakpoints.resume("a") && !breakpoints.resume("c"));
        assert_eq!(finished.load(Ordering::Relaxed), 0);
        // That of `b` is used up: nothing is removed, and still the request goes on.
        assert!(!breakpoints.remove("b"));
        breakpoints.wait_until(|_| finished.load(Ordering::Relaxed) == 1);
        breakpoints.wait_until(|stopped| stopped == ["c"]);
        breakpoints.set(Event::WRITE_AIO, "d");
        breakpoints.clear();
    });
    assert_eq!(*said.lock(), "Suspended b, Suspended a, Resuming a, Resuming b, Suspended c, Resuming c, ");
}
