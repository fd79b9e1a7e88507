//! The engine: a machine half that writes interrupts down, and a vCPU that runs a closure.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use guest_ram::GuestRam;
use hv_core::{
    Accel, AccelError, AccelReport, Clock, Doorbell, DoorbellError, Halt, Kick, Msi, MsiSink, StopToken, Topology,
    Vcpu, VcpuIo, Vm, VmParts,
};

/// What plays the vCPU: called once, on the vCPU's thread.
pub type Program = Box<dyn FnOnce(&dyn VcpuIo, &NullVm) + Send>;

/// Makes machines whose vCPU 0 runs one program and then idles until it is stopped.
pub struct NullAccel {
    program: Mutex<Option<Program>>,
}

impl NullAccel {
    /// An engine whose first machine runs `program`.
    pub fn new(program: Program) -> NullAccel {
        NullAccel { program: Mutex::new(Some(program)) }
    }
    /// An engine whose vCPUs do nothing.
    pub fn idle() -> NullAccel {
        NullAccel { program: Mutex::new(None) }
    }
}

impl Accel for NullAccel {
    type Vm = NullVm;
    type Vcpu = NullVcpu;

    fn probe(&self) -> AccelReport {
        AccelReport { name: "null", refusal: None, physical_bits: 46, max_vcpus: 255 }
    }
    fn cpuid(&self) -> x86::CpuidTable {
        x86::CpuidTable::default()
    }
    fn build(
        &self,
        _ram: GuestRam,
        topology: &Topology,
        _cpuid: &x86::CpuidTable,
        clock: Clock,
    ) -> Result<VmParts<NullVm, NullVcpu>, AccelError> {
        let vm = Arc::new(NullVm { clock, log: Mutex::default() });
        let mut program = self.program.lock().unwrap_or_else(PoisonError::into_inner).take();
        let vcpus = (0..topology.vcpus)
            .map(|_| NullVcpu {
                vm: vm.clone(),
                program: program.take(),
                state: x86::State::power_on(),
                bell: Arc::default(),
            })
            .collect();
        Ok(VmParts { vm, vcpus })
    }
}

#[derive(Default)]
struct Log {
    msis: Vec<Msi>,
    extint: bool,
    routes: std::collections::BTreeMap<u8, Msi>,
    doorbells: Vec<Doorbell>,
}

/// The machine-wide half: remembers what devices did to it.
pub struct NullVm {
    clock: Clock,
    log: Mutex<Log>,
}

impl NullVm {
    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// The machine's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }
    /// Messages signalled since the last call, oldest first.
    pub fn take_msis(&self) -> Vec<Msi> {
        std::mem::take(&mut self.log().msis)
    }
    /// Level of the 8259's output.
    pub fn extint(&self) -> bool {
        self.log().extint
    }
    /// What the IOAPIC last said about `pin`.
    pub fn ioapic_route(&self, pin: u8) -> Option<Msi> {
        self.log().routes.get(&pin).copied()
    }
    /// Doorbells on offer now.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        self.log().doorbells.clone()
    }
}

impl MsiSink for NullVm {
    fn signal(&self, msi: Msi) {
        self.log().msis.push(msi);
    }
}

fn same_place(a: &Doorbell, b: &Doorbell) -> bool {
    (a.space, a.address, a.bytes, a.value) == (b.space, b.address, b.bytes, b.value)
}

impl Vm for NullVm {
    fn set_ioapic_route(&self, pin: u8, route: Option<Msi>) {
        match route {
            Some(msi) => self.log().routes.insert(pin, msi),
            None => self.log().routes.remove(&pin),
        };
    }
    fn set_extint(&self, high: bool) {
        self.log().extint = high;
    }
    fn add_doorbell(&self, doorbell: &Doorbell) -> Result<(), DoorbellError> {
        self.log().doorbells.push(doorbell.clone());
        Ok(())
    }
    fn remove_doorbell(&self, doorbell: &Doorbell) {
        self.log().doorbells.retain(|d| !same_place(d, doorbell));
    }
}

#[derive(Default)]
struct Bell {
    kicked: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Kick for Bell {
    fn kick(&self) {
        let _guard = self.lock.lock();
        self.kicked.store(true, Ordering::SeqCst);
        self.wake.notify_all();
    }
}

/// A vCPU that runs its program, then waits to be stopped.
pub struct NullVcpu {
    vm: Arc<NullVm>,
    program: Option<Program>,
    state: x86::State,
    bell: Arc<Bell>,
}

impl Vcpu for NullVcpu {
    fn run<I: VcpuIo>(&mut self, io: &I, stop: &StopToken) -> Halt {
        if let Some(program) = self.program.take() {
            program(io, &self.vm);
        }
        let mut guard = self.bell.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !stop.is_stopped() {
            self.bell.kicked.store(false, Ordering::SeqCst);
            guard = self.bell.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        Halt::Stop
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        self.bell.clone()
    }
    fn state(&mut self) -> Result<x86::State, AccelError> {
        Ok(self.state.clone())
    }
    fn set_state(&mut self, state: &x86::State) -> Result<(), AccelError> {
        self.state = state.clone();
        Ok(())
    }
    fn instructions(&self) -> Option<u64> {
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;
    impl VcpuIo for Nothing {
        fn port_read(&self, _port: u16, _bytes: u8) -> u32 {
            7
        }
        fn port_write(&self, _port: u16, _bytes: u8, _value: u32) {}
        fn mmio_read(&self, _gpa: hv_core::Gpa, _bytes: u8) -> u64 {
            0
        }
        fn mmio_write(&self, _gpa: hv_core::Gpa, _bytes: u8, _value: u64) {}
        fn pic_ack(&self) -> Option<u8> {
            None
        }
        fn eoi(&self, _vector: u8) {}
        fn run_due(&self, _now: hv_core::GuestNs) -> Option<hv_core::GuestNs> {
            None
        }
    }

    #[test]
    fn the_program_sees_the_board_and_a_kick_ends_the_idle_loop() {
        let (sent, seen) = std::sync::mpsc::channel();
        let accel = NullAccel::new(Box::new(move |io, _| sent.send(io.port_read(0, 1)).unwrap()));
        let ram = GuestRam::new(&[(hv_core::Gpa(0), 4096)]).unwrap();
        let parts = accel.build(ram, &Topology { vcpus: 1 }, &accel.cpuid(), Clock::virtual_clock()).unwrap();
        let mut vcpu = parts.vcpus.into_iter().next().unwrap();
        let (stop, kick) = (StopToken::default(), vcpu.kicker());
        let token = stop.clone();
        let thread = std::thread::spawn(move || vcpu.run(&Nothing, &token));
        assert_eq!(seen.recv().unwrap(), 7);
        stop.stop();
        kick.kick();
        assert_eq!(thread.join().unwrap(), Halt::Stop);
    }
}
