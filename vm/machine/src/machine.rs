//! A machine: board, memory, engine and what it boots.

use std::sync::Arc;

use chipset::serial::SerialSink;
use guest_ram::{Gpa, GuestRam, RamError};
use hv_core::{Accel, AccelError, Clock, Kick, StopToken, Topology, Vcpu, Vm, VmParts};
use pci::BarKind;
use pci::config::{BAR0, INTERRUPT_LINE};

use crate::acpi::{self, AcpiConfig};
use crate::bell::{Bell, SharedWork};
use crate::board::{Board, BoardParts};
use crate::boot::{BootError, BootSource, Target};
use crate::devices::{self, DeviceSpec};
use crate::layout;
use crate::power::PowerLatch;

/// What a machine is made of.
pub struct MachineConfig {
    /// Guest memory in bytes.
    pub ram_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest time.
    pub clock: Clock,
    /// Seconds since 1970 that the RTC shows at the start.
    pub unix_s: i64,
    /// The host's ends of the serial ports.
    pub serial: [Option<Box<dyn SerialSink>>; 4],
    /// Where firmware's debug output goes.
    pub debug_console: Option<Box<dyn FnMut(u8) + Send>>,
    /// PCI devices, in slot order from device 1 on.
    pub devices: Vec<DeviceSpec>,
    /// What is booted.
    pub boot: BootSource,
}

/// Why a machine cannot be built or reset.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Memory size.
    #[error("{bytes} bytes of memory: a guest needs at least {min_bytes} bytes, in whole pages of 4096")]
    MemorySize {
        /// Asked for.
        bytes: u64,
        /// Least.
        min_bytes: u64,
    },
    /// Memory beyond the engine's physical addresses.
    #[error("{bytes} bytes of memory do not fit into {physical_bits} physical address bits")]
    MemoryBeyond {
        /// Asked for.
        bytes: u64,
        /// Limit of the engine.
        physical_bits: u8,
    },
    /// No vCPU at all.
    #[error("a machine needs at least one vCPU")]
    NoVcpu,
    /// More devices than slots.
    #[error("{count} devices do not fit into the {slots} free slots of the PCI bus")]
    TooManyDevices {
        /// Asked for.
        count: usize,
        /// There are.
        slots: usize,
    },
    /// The PCI windows are full.
    #[error("the registers of PCI device {device} ({bytes} bytes) do not fit into the address window below 4 GiB")]
    WindowFull {
        /// Device number.
        device: u8,
        /// Size of the BAR.
        bytes: u64,
    },
    /// Guest memory.
    #[error("guest memory")]
    Ram(#[from] RamError),
    /// The kernel.
    #[error("the kernel cannot be booted")]
    Boot(#[from] BootError),
    /// The engine.
    #[error("the engine")]
    Accel(#[from] AccelError),
    /// A device could not be made.
    #[error("device {device}: an event descriptor cannot be created")]
    Event {
        /// Device number.
        device: u8,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

/// Devices take slots 1 to 30.
const FREE_SLOTS: usize = 30;

/// The parts of a machine that do not run: the thread that owns the lifecycle holds this.
pub struct Machine {
    board: Arc<Board>,
    ram: GuestRam,
    regions: Vec<(Gpa, u64)>,
    boot: BootSource,
    acpi: AcpiConfig,
    power: Arc<PowerLatch>,
    stopper: Stopper,
    workers: Vec<Worker>,
}

/// Makes vCPUs return from `run`, from any thread. Clones stop the same vCPUs.
#[derive(Clone)]
pub struct Stopper {
    tokens: Vec<StopToken>,
    kicks: Vec<Arc<dyn Kick>>,
}

impl Stopper {
    /// Asks every vCPU to return.
    pub fn stop(&self) {
        self.tokens.iter().for_each(StopToken::stop);
        self.kicks.iter().for_each(|kick| kick.kick());
    }
    /// Takes the request back, before vCPUs run again.
    pub fn clear(&self) {
        self.tokens.iter().for_each(StopToken::clear);
    }
    /// The token that vCPU `index` runs with.
    pub fn token(&self, index: usize) -> Option<&StopToken> {
        self.tokens.get(index)
    }
}

/// A working half and its doorbell, for the I/O thread.
#[derive(Clone)]
pub struct Worker {
    /// The working half.
    pub work: SharedWork,
    /// What wakes it.
    pub bell: Arc<Bell>,
    /// Which device of the configuration it belongs to, from 0 on.
    pub device: usize,
    /// Which lane of it: its queues are those whose number leaves this remainder when divided by the number of lanes.
    pub lane: usize,
}

impl Machine {
    /// Builds a machine on `accel`, reset and ready to run: the vCPUs have their initial state.
    pub fn build<A: Accel>(accel: &A, config: MachineConfig) -> Result<(Machine, Vec<A::Vcpu>), MachineError> {
        if config.vcpus == 0 {
            return Err(MachineError::NoVcpu);
        }
        let regions = layout::ram_regions(config.ram_bytes)?;
        let physical_bits = accel.probe().physical_bits.clamp(32, 52);
        let (top, limit) = (layout::ram_top(&regions), 1u64 << physical_bits);
        if top > limit {
            return Err(MachineError::MemoryBeyond { bytes: config.ram_bytes, physical_bits });
        }
        let ram = GuestRam::new(&regions)?;
        let topology = Topology { vcpus: config.vcpus };
        let VmParts { vm, vcpus } = accel.build(ram.clone(), &topology, &accel.cpuid(), config.clock.clone())?;
        let vm: Arc<dyn Vm> = vm;
        let power = Arc::<PowerLatch>::default();
        let acpi = AcpiConfig {
            vcpus: config.vcpus,
            serial: config.serial.each_ref().map(Option::is_some),
            high_window: high_window(top, limit),
        };
        let mut board = Board::new(BoardParts {
            clock: config.clock.clone(),
            vm,
            power: power.clone(),
            unix_s: config.unix_s,
            serial: config.serial,
            debug_console: config.debug_console,
        });
        let workers = add_devices(&mut board, &ram, &config.clock, config.devices)?;
        preset_cmos(&board, &regions, config.vcpus);
        let machine = Machine {
            board: Arc::new(board),
            ram,
            regions,
            boot: config.boot,
            acpi,
            power,
            stopper: Stopper {
                tokens: vcpus.iter().map(|_| StopToken::default()).collect(),
                kicks: vcpus.iter().map(Vcpu::kicker).collect(),
            },
            workers,
        };
        Ok((machine, vcpus))
    }

    /// The bus that vCPUs run on.
    pub fn board(&self) -> &Arc<Board> {
        &self.board
    }
    /// Guest memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }
    /// Where power events arrive.
    pub fn power(&self) -> &Arc<PowerLatch> {
        &self.power
    }
    /// What stops the vCPUs.
    pub fn stopper(&self) -> &Stopper {
        &self.stopper
    }
    /// Working halves, in slot order.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// Runs what working halves have pending, on the calling thread. For a machine whose vCPUs and I/O thread stand.
    pub fn drain_workers(&self) {
        self.workers.iter().for_each(|worker| worker.work.lock().work());
    }
    /// The machine goes on after a pause: requests held back because of an error are tried again.
    pub fn resume_workers(&self) {
        for worker in &self.workers {
            worker.work.lock().resumed();
            hv_core::Ring::ring(&*worker.bell);
        }
    }

    /// Puts everything into the state after power-on and loads what is booted. Returns the state of the first vCPU; the
    /// others wait for their start-up message in [`x86::State::power_on`], halted. vCPUs and I/O thread stand.
    pub fn reset(&mut self) -> Result<Vec<x86::State>, MachineError> {
        self.board.reset();
        self.drain_workers();
        assign_windows(&self.board)?;
        let tables = acpi::tables(&self.acpi, layout::ACPI_TABLES);
        self.ram.write(Gpa(layout::ACPI_TABLES), &tables)?;
        let map = layout::memory_map(&self.regions);
        let low_end = self.regions.first().map_or(0, |&(_, bytes)| bytes);
        let target = Target { ram: &self.ram, map: &map, low_end, rsdp: layout::ACPI_TABLES };
        let mut states = vec![self.boot.load(&target)?];
        states.resize_with(self.stopper.tokens.len(), || x86::State { halted: true, ..x86::State::power_on() });
        Ok(states)
    }
}

/// Where 64-bit BARs may be put: the highest quarter of the address space, above memory.
fn high_window(ram_top: u64, limit: u64) -> Option<(u64, u64)> {
    let start = (limit / 4 * 3).max(ram_top.next_multiple_of(1 << 30));
    (limit > 1 << 33 && start < limit).then_some((start, limit - 1))
}

/// Bells as the clock wants them.
fn bells(count: usize, clock: &Clock) -> std::io::Result<Vec<Arc<Bell>>> {
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    let bell = |_| {
        let event = rustix::event::eventfd(0, flags)?;
        Ok(Arc::new(if clock.is_virtual() { Bell::inline(event) } else { Bell::waking(event) }))
    };
    (0..count).map(bell).collect()
}

fn add_devices(
    board: &mut Board,
    ram: &GuestRam,
    clock: &Clock,
    specs: Vec<DeviceSpec>,
) -> Result<Vec<Worker>, MachineError> {
    if specs.len() > FREE_SLOTS {
        return Err(MachineError::TooManyDevices { count: specs.len(), slots: FREE_SLOTS });
    }
    let mut workers = Vec::new();
    for (device, spec) in (1u8..).zip(specs) {
        let bells = bells(spec.lanes(), clock).map_err(|source| MachineError::Event { device, source })?;
        let Some((bell, more)) = bells.split_first() else { continue };
        let pin = board.interrupt_pin(device);
        let made = devices::make(spec, ram, board.messages(), pin, bell.clone(), more);
        board.add_function(device, made.function);
        for (lane, (work, bell)) in made.lanes.into_iter().zip(&bells).enumerate() {
            bell.connect(&work);
            workers.push(Worker { work, bell: bell.clone(), device: usize::from(device) - 1, lane });
        }
    }
    Ok(workers)
}

/// Memory size and processor count where SeaBIOS looks for them first.
fn preset_cmos(board: &Board, regions: &[(Gpa, u64)], vcpus: u32) {
    let low = regions.first().map_or(0, |&(_, bytes)| bytes);
    let high: u64 = regions.iter().skip(1).map(|&(_, bytes)| bytes).sum();
    let above_16m = (low.saturating_sub(16 << 20) >> 16).min(0xffff) as u16;
    let high = (high >> 16).min(0xff_ffff) as u32;
    let values = above_16m.to_le_bytes().into_iter().chain(high.to_le_bytes().into_iter().take(3));
    [0x34, 0x35, 0x5b, 0x5c, 0x5d].into_iter().zip(values).for_each(|(index, value)| board.preset_cmos(index, value));
    board.preset_cmos(0x5f, (vcpus - 1).min(255) as u8);
}

/// Gives every BAR an address and every function an interrupt line, as firmware would.
fn assign_windows(board: &Board) -> Result<(), MachineError> {
    let (mut memory, memory_end) = layout::PCI_MEMORY;
    let (mut port, port_end) = layout::PCI_PORTS;
    for (device, _, function) in board.root().functions() {
        let mut function = function.lock();
        let bars: Vec<(u8, BarKind, u64)> = function.config().bars().collect();
        for (index, kind, bytes) in bars {
            let (next, end) = match kind {
                BarKind::Io => (&mut port, port_end),
                BarKind::Memory32 | BarKind::Memory64 => (&mut memory, memory_end),
            };
            let base = next.next_multiple_of(bytes);
            let Some(after) = base.checked_add(bytes).filter(|&after| after <= end) else {
                return Err(MachineError::WindowFull { device, bytes });
            };
            *next = after;
            function.config_write(BAR0 + 4 * index, 4, base as u32);
        }
        if function.config().read(pci::config::INTERRUPT_PIN, 1) != 0 {
            function.config_write(INTERRUPT_LINE, 1, pci::gsi(device, 0).into());
        }
    }
    board.remap();
    Ok(())
}
