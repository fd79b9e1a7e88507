//! What happens to a machine when something happens: a pure transition function.

use monitor::{Event, Failure, FailureClass, PowerAction, RunReason, RunState, ShutdownCause, Status};

/// Something that concerns the run state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Let the vCPUs run.
    Cont,
    /// Stop the vCPUs.
    Stop,
    /// The reset button.
    Reset,
    /// The power button.
    PowerButton,
    /// End the process.
    Quit,
    /// The guest powered off.
    GuestPowerOff,
    /// The guest reset the machine, or met a triple fault.
    GuestReset,
    /// The guest says it has crashed, or the engine cannot go on; the text is for people.
    Crash(String),
    /// A disk request is held; the machine waits for room.
    DiskHeld,
}

/// What the owner does, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// vCPUs, I/O thread and clock stand.
    Halt,
    /// They go on.
    Run,
    /// Everything as after power-on.
    Reset,
    /// Press the power button.
    PressPower,
    /// Tell the peers.
    Emit(Event),
    /// The process ends.
    End(ShutdownCause),
}

/// What power events lead to.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Guest power-off.
    pub on_poweroff: PowerAction,
    /// Guest reset.
    pub on_reboot: PowerAction,
    /// Crash.
    pub on_crash: PowerAction,
}

/// The run state and the rules.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    status: Status,
    policy: Policy,
}

impl Lifecycle {
    /// A machine that was built and does not run.
    pub fn new(policy: Policy) -> Lifecycle {
        Lifecycle { status: Status { state: RunState::Prelaunch, reason: RunReason::Booted }, policy }
    }
    /// The run state.
    pub fn status(&self) -> Status {
        self.status
    }
    fn running(&self) -> bool {
        self.status.state == RunState::Running
    }
    fn become_state(&mut self, state: RunState, reason: RunReason) {
        self.status = Status { state, reason };
    }

    /// The transition. An error changes nothing.
    pub fn apply(&mut self, cause: Cause) -> Result<Vec<Action>, Failure> {
        Ok(match cause {
            Cause::Cont => return self.cont(),
            Cause::Stop if self.running() => {
                self.become_state(RunState::Paused, RunReason::User);
                vec![Action::Halt, Action::Emit(Event::Stopped { reason: RunReason::User })]
            }
            Cause::Stop => Vec::new(),
            Cause::Reset => self.reset(),
            Cause::PowerButton if self.status.state == RunState::Shutdown => return Err(powered_off()),
            Cause::PowerButton => vec![Action::PressPower],
            Cause::Quit => vec![
                Action::Halt,
                Action::Emit(Event::Shutdown { cause: ShutdownCause::Quit }),
                Action::End(ShutdownCause::Quit),
            ],
            Cause::GuestPowerOff => {
                self.guest_ends(self.policy.on_poweroff, RunReason::GuestShutdown, ShutdownCause::PowerOff)
            }
            Cause::GuestReset => self.guest_ends(self.policy.on_reboot, RunReason::GuestShutdown, ShutdownCause::Reset),
            Cause::Crash(text) => {
                let mut actions = self.guest_ends(self.policy.on_crash, RunReason::Crashed, ShutdownCause::Crash);
                actions.insert(1, Action::Emit(Event::Crashed { text }));
                actions
            }
            Cause::DiskHeld if self.running() => {
                self.become_state(RunState::Paused, RunReason::IoError);
                vec![Action::Halt, Action::Emit(Event::Stopped { reason: RunReason::IoError })]
            }
            Cause::DiskHeld => Vec::new(),
        })
    }

    fn cont(&mut self) -> Result<Vec<Action>, Failure> {
        match self.status.state {
            RunState::Running => Ok(Vec::new()),
            RunState::Shutdown => Err(powered_off()),
            RunState::Prelaunch | RunState::Paused => {
                let first = self.status.state == RunState::Prelaunch;
                self.become_state(RunState::Running, if first { RunReason::Booted } else { RunReason::User });
                Ok(vec![Action::Run, Action::Emit(Event::Resumed)])
            }
        }
    }

    /// A machine that does not run is reset too, and stays as it is; one that was kept after its end can be continued.
    fn reset(&mut self) -> Vec<Action> {
        let emit = Action::Emit(Event::Reset { guest: false });
        match self.status.state {
            RunState::Running => vec![Action::Halt, Action::Reset, emit, Action::Run],
            RunState::Shutdown => {
                self.become_state(RunState::Paused, RunReason::User);
                vec![Action::Reset, emit]
            }
            RunState::Prelaunch | RunState::Paused => vec![Action::Reset, emit],
        }
    }

    fn guest_ends(&mut self, action: PowerAction, reason: RunReason, cause: ShutdownCause) -> Vec<Action> {
        match action {
            PowerAction::Destroy => vec![Action::Halt, Action::Emit(Event::Shutdown { cause }), Action::End(cause)],
            PowerAction::Restart => {
                vec![Action::Halt, Action::Reset, Action::Emit(Event::Reset { guest: true }), Action::Run]
            }
            PowerAction::Preserve => {
                self.become_state(RunState::Shutdown, reason);
                vec![Action::Halt, Action::Emit(Event::Stopped { reason })]
            }
        }
    }
}

fn powered_off() -> Failure {
    let text = "the machine has been shut down and is only kept: reset it first".into();
    Failure { class: FailureClass::State, text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Action::{Emit, End, Halt, PressPower, Run};

    fn machine(action: PowerAction) -> Lifecycle {
        Lifecycle::new(Policy { on_poweroff: action, on_reboot: action, on_crash: action })
    }

    #[test]
    fn commands_change_the_state_once() {
        let mut m = machine(PowerAction::Destroy);
        let stopped = |reason| Emit(Event::Stopped { reason });
        let cases = [
            (Cause::Stop, vec![], (RunState::Prelaunch, RunReason::Booted)),
            (Cause::Cont, vec![Run, Emit(Event::Resumed)], (RunState::Running, RunReason::Booted)),
            (Cause::Cont, vec![], (RunState::Running, RunReason::Booted)),
            (Cause::PowerButton, vec![PressPower], (RunState::Running, RunReason::Booted)),
            (Cause::DiskHeld, vec![Halt, stopped(RunReason::IoError)], (RunState::Paused, RunReason::IoError)),
            (Cause::DiskHeld, vec![], (RunState::Paused, RunReason::IoError)),
            (Cause::Cont, vec![Run, Emit(Event::Resumed)], (RunState::Running, RunReason::User)),
            (Cause::Stop, vec![Halt, stopped(RunReason::User)], (RunState::Paused, RunReason::User)),
            (
                Cause::Reset,
                vec![Action::Reset, Emit(Event::Reset { guest: false })],
                (RunState::Paused, RunReason::User),
            ),
        ];
        for (cause, actions, (state, reason)) in cases {
            assert_eq!(m.apply(cause.clone()).unwrap(), actions, "{cause:?}");
            assert_eq!(m.status(), Status { state, reason }, "{cause:?}");
        }
    }

    #[test]
    fn the_policy_decides_what_a_power_off_does() {
        let shutdown = Emit(Event::Shutdown { cause: ShutdownCause::PowerOff });
        let cases = [
            (PowerAction::Destroy, vec![Halt, shutdown, End(ShutdownCause::PowerOff)], RunState::Running),
            (
                PowerAction::Restart,
                vec![Halt, Action::Reset, Emit(Event::Reset { guest: true }), Run],
                RunState::Running,
            ),
            (
                PowerAction::Preserve,
                vec![Halt, Emit(Event::Stopped { reason: RunReason::GuestShutdown })],
                RunState::Shutdown,
            ),
        ];
        for (policy, actions, state) in cases {
            let mut m = machine(policy);
            m.apply(Cause::Cont).unwrap();
            assert_eq!(m.apply(Cause::GuestPowerOff).unwrap(), actions, "{policy:?}");
            assert_eq!(m.status().state, state);
        }
    }

    #[test]
    fn a_kept_machine_goes_on_only_after_a_reset() {
        let mut m = machine(PowerAction::Preserve);
        m.apply(Cause::Cont).unwrap();
        let actions = m.apply(Cause::Crash("oops".into())).unwrap();
        let crashed = Emit(Event::Crashed { text: "oops".into() });
        assert_eq!(actions, [Halt, crashed, Emit(Event::Stopped { reason: RunReason::Crashed })]);
        assert_eq!(m.status(), Status { state: RunState::Shutdown, reason: RunReason::Crashed });
        assert_eq!(m.apply(Cause::Cont).unwrap_err().class, FailureClass::State);
        assert_eq!(m.apply(Cause::PowerButton).unwrap_err().class, FailureClass::State);
        m.apply(Cause::Reset).unwrap();
        assert!(m.apply(Cause::Cont).is_ok());
    }
}
