//! `build`: the programs as they are installed.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::packages::{self, Consent};
use crate::run::{cargo, root, run, say, target};

/// The image tool brings its C library along: it is started thousands of times for a moment each, and finding libraries is
/// half of such a moment and a third of its memory. Places in itself that depend on its address take few bytes.
const ALONE: [&str; 4] = ["-C", "target-feature=+crt-static", "-C", "link-arg=-Wl,-z,pack-relative-relocs"];
/// Linker script, from the root: what is placed first in the image tool. `layout` writes it.
pub const LAYOUT: &str = "storage/img/layout.ld";

/// Builds all of them.
pub fn go(consent: Consent) -> Result<()> {
    packages::ensure(&[packages::BUILD], consent)?;
    vmm()?;
    say("building vireod and vireo");
    run(cargo().args(["build", "--release", "-p", "daemon", "-p", "cli"]))?;
    image_tool()?;
    println!("{}", target().join("release").display());
    Ok(())
}

/// `vireo-vmm`; where it is.
pub fn vmm() -> Result<PathBuf> {
    say("building vireo-vmm without checks (release)");
    run(cargo().args(["build", "--release", "-p", "vmm"]))?;
    Ok(target().join("release/vireo-vmm"))
}

/// `vireo-img`; where it is.
pub fn image_tool() -> Result<PathBuf> {
    say("building vireo-img without checks (release)");
    image_tool_linked(&format!("-T,{}", root().join(LAYOUT).display()))
}

/// `vireo-img` in the linker's own order, which `map` tells; where it is.
pub fn image_tool_with_map(map: &Path) -> Result<PathBuf> {
    say("building vireo-img in the linker's order");
    image_tool_linked(&format!("-Map,{}", map.display()))
}

fn image_tool_linked(option: &str) -> Result<PathBuf> {
    let option = ["-C".to_owned(), format!("link-arg=-Wl,{option}")];
    run(cargo().args(["rustc", "--release", "-p", "img", "--bin", "vireo-img", "--"]).args(ALONE).args(option))?;
    Ok(target().join("release/vireo-img"))
}
