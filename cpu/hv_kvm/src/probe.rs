//! Is KVM usable here? Answered by a guest of twenty instructions that uses what every stock kernel uses.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use guest_ram::{Gpa, GuestRam};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

/// 16-bit code at 0x1000. Each step says on port 0xf1 which feature comes next, so that a stop names it; port 0xf0 ends.
///
/// ```text
/// mov al,1; out 0xf1,al; popcnt eax,ebx
/// mov al,2; out 0xf1,al; pxor xmm0,xmm0
/// mov al,3; out 0xf1,al; xor ecx,ecx; xgetbv
/// mov al,4; out 0xf1,al; mov ecx,200000; l: dec ecx; jnz l
/// mov al,0; out 0xf0,al
/// ```
const CODE: &[u8] = &[
    0xb0, 0x01, 0xe6, 0xf1, 0xf3, 0x66, 0x0f, 0xb8, 0xc3, // popcnt
    0xb0, 0x02, 0xe6, 0xf1, 0x66, 0x0f, 0xef, 0xc0, // pxor
    0xb0, 0x03, 0xe6, 0xf1, 0x66, 0x31, 0xc9, 0x0f, 0x01, 0xd0, // xgetbv
    0xb0, 0x04, 0xe6, 0xf1, 0x66, 0xb9, 0x40, 0x0d, 0x03, 0x00, 0x66, 0x49, 0x75, 0xfc, // loop
    0xb0, 0x00, 0xe6, 0xf0,
];
const CODE_AT: u64 = 0x1000;
const LOOP_INSTRUCTIONS: u32 = 400_000;
/// A processor does this in well under a millisecond, one that is itself emulated (a lab) in tens; an instruction
/// emulator at one or two million instructions per second takes hundreds.
const LOOP_LIMIT: Duration = Duration::from_millis(120);
const STEPS: [&str; 5] = ["the first instruction", "POPCNT", "SSE (PXOR)", "XGETBV", "a loop"];

/// Why KVM cannot be used, with what helps.
#[derive(Debug)]
pub enum Refusal {
    /// The device cannot be opened.
    Open {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        kind: io::ErrorKind,
    },
    /// A call failed.
    Call {
        /// Which.
        call: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// The guest stopped before the end.
    Stopped {
        /// What it was about to do.
        step: &'static str,
        /// What KVM reported.
        exit: String,
    },
    /// It ran, but emulated.
    Slow {
        /// Million instructions per second.
        mips: f64,
    },
}

impl Refusal {
    pub(crate) fn open(path: &Path, error: &io::Error) -> Refusal {
        Refusal::Open { path: path.to_path_buf(), kind: error.kind() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Open { path, kind: io::ErrorKind::NotFound } => write!(
                f,
                "{} does not exist: load the module kvm_intel or kvm_amd, or switch virtualisation on in the firmware (in \
                 a virtual machine: ask for nested virtualisation)",
                path.display()
            ),
            Refusal::Open { path, kind: io::ErrorKind::PermissionDenied } => {
                write!(f, "this user may not open {}: add the user to the group kvm and log in again", path.display())
            }
            Refusal::Open { path, kind } => write!(f, "{} cannot be opened: {kind}", path.display()),
            Refusal::Call { call, error } => write!(f, "{call} failed: {error}"),
            Refusal::Stopped { step, exit } => write!(
                f,
                "a test guest could not execute {step} ({exit}): this KVM emulates instructions and cannot run stock \
                 kernels; domains of type 'qemu' run on the software CPU"
            ),
            Refusal::Slow { mips } => write!(
                f,
                "a test guest ran at {mips:.1} million instructions per second: this KVM emulates instructions; domains \
                 of type 'qemu' run faster on the software CPU"
            ),
        }
    }
}

fn call(name: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Refusal {
    move |e| Refusal::Call { call: name, error: io::Error::from_raw_os_error(e.errno()) }
}

/// Runs the test guest.
pub(crate) fn run(kvm: &Kvm) -> Result<(), Refusal> {
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    let memory = || -> Result<GuestRam, guest_ram::RamError> {
        let ram = GuestRam::new(&[(Gpa(0), 0x4000)])?;
        ram.write(Gpa(CODE_AT), CODE)?;
        Ok(ram)
    };
    let ram = memory().map_err(|e| Refusal::Call { call: "memory for the test guest", error: io::Error::other(e) })?;
    for (slot, region) in (0..).zip(ram.regions()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.gpa.0,
            memory_size: region.bytes,
            userspace_addr: region.host as u64,
        };
        // SAFETY: `ram` maps the range and outlives `vm`, which was declared before but is not used after this function.
        unsafe { vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    }
    let mut vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
    let cpuid =
        kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
    let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    sregs.cr4 |= 1 << 9 | 1 << 18; // OSFXSR, OSXSAVE
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
    (regs.rip, regs.rflags, regs.rbx) = (CODE_AT, 2, 0x55);
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    let mut step = 0;
    let mut loop_start = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0xf1, data)) => {
                step = data.first().copied().unwrap_or(0) as usize;
                loop_start = Instant::now();
            }
            Ok(VcpuExit::IoOut(0xf0, _)) => break,
            Ok(exit) => {
                let exit = format!("{exit:?}");
                return Err(Refusal::Stopped { step: STEPS[step.min(STEPS.len() - 1)], exit });
            }
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(call("KVM_RUN")(e)),
        }
    }
    let took = loop_start.elapsed();
    if took > LOOP_LIMIT {
        return Err(Refusal::Slow { mips: LOOP_INSTRUCTIONS as f64 / took.as_secs_f64() / 1e6 });
    }
    Ok(())
}
