//! Files that survive a power cut: written beside their place, synced, renamed, and the directory synced.
//!
//! The file layer is a trait so that a test can cut the power after every single step and look at what is left.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The steps that changes of stored files are made of.
pub trait FileLayer: Send + Sync {
    /// Makes (or empties) a file that only its owner may read, writes `bytes` and syncs it.
    fn write_synced(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Moves a file over another in one step.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes a symbolic link.
    fn symlink(&self, target: &Path, link: &Path) -> io::Result<()>;
    /// Makes names in a directory durable.
    fn sync_directory(&self, directory: &Path) -> io::Result<()>;
}

/// The real one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl FileLayer for Disk {
    fn write_synced(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
    fn symlink(&self, target: &Path, link: &Path) -> io::Result<()> {
        std::os::unix::fs::symlink(target, link)
    }
    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        File::open(directory)?.sync_all()
    }
}

/// Domain definitions in `NAME.xml` and their autostart links.
#[derive(Clone, Debug)]
pub struct DefinitionStore<L> {
    definitions: PathBuf,
    autostart: PathBuf,
    layer: L,
}

/// Put before every definition.
const NOTICE: &str = "<!--\nWARNING: THIS IS AN AUTO-GENERATED FILE. CHANGES TO IT ARE LIKELY TO BE\n\
                      OVERWRITTEN AND LOST. Changes to this xml configuration should be made using:\n  virsh edit ";

impl<L: FileLayer> DefinitionStore<L> {
    /// A store in two directories, which exist.
    pub fn new(definitions: PathBuf, autostart: PathBuf, layer: L) -> DefinitionStore<L> {
        DefinitionStore { definitions, autostart, layer }
    }

    /// Where the definition of `name` is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.definitions.join(format!("{name}.xml"))
    }

    fn link(&self, name: &str) -> PathBuf {
        self.autostart.join(format!("{name}.xml"))
    }

    /// Stores a definition. When this returns, a power cut leaves the new one; until then, the old one or the new one.
    pub fn save(&self, name: &str, xml: &str) -> io::Result<()> {
        // A comment cannot contain two hyphens, a name can.
        let shown = name.replace("--", "- -");
        let text = format!("{NOTICE}{shown}\nor other application using the libvirt API.\n-->\n\n{xml}");
        let path = self.path(name);
        // The suffix keeps it out of the listing at the next start.
        let temporary = self.definitions.join(format!("{name}.xml.new"));
        self.layer.write_synced(&temporary, text.as_bytes())?;
        self.layer.rename(&temporary, &path)?;
        self.layer.sync_directory(&self.definitions)
    }

    /// Forgets a definition and its autostart link.
    pub fn delete(&self, name: &str) -> io::Result<()> {
        self.set_autostart(name, false)?;
        ignore_missing(self.layer.remove(&self.path(name)))?;
        self.layer.sync_directory(&self.definitions)
    }

    /// Gives a definition another name. A power cut leaves the old one, the new one, or both: the new name is stored
    /// before the old one is removed, and [`DefinitionStore::load_all`] keeps one file per uuid.
    pub fn rename(&self, old: &str, new: &str, xml: &str, autostart: bool) -> io::Result<()> {
        self.save(new, xml)?;
        if autostart {
            self.set_autostart(new, true)?;
        }
        self.delete(old)
    }

    /// Makes or removes the autostart link.
    pub fn set_autostart(&self, name: &str, autostart: bool) -> io::Result<()> {
        let link = self.link(name);
        if autostart {
            match self.layer.symlink(&self.path(name), &link) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
        } else {
            match self.layer.remove(&link) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => other?,
            }
        }
        self.layer.sync_directory(&self.autostart)
    }

    /// Reads every definition: name by file, text, autostart. Files that cannot be read are handed to `skipped`.
    pub fn load_all(&self, mut skipped: impl FnMut(&Path, &io::Error)) -> io::Result<Vec<Stored>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.definitions)? {
            let path = entry?.path();
            let is_definition = path.extension().is_some_and(|extension| extension == "xml");
            let Some(name) = path.file_stem().and_then(|stem| stem.to_str()).filter(|_| is_definition) else {
                continue;
            };
            match fs::read(&path) {
                Ok(text) => {
                    let autostart = fs::symlink_metadata(self.link(name)).is_ok();
                    found.push(Stored { name: name.into(), text, autostart });
                }
                Err(error) => skipped(&path, &error),
            }
        }
        // The order of a directory is chance; a start should not be.
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
}

/// A definition as it lies on disk.
#[derive(Debug)]
pub struct Stored {
    /// Name, by its file.
    pub name: String,
    /// The file's bytes.
    pub text: Vec<u8>,
    /// It has an autostart link.
    pub autostart: bool,
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Lets `steps` steps happen and fails every later one. The step at the limit is done by halves, the way a power cut
    /// would do it: a file that was not synced may have any prefix of its bytes.
    #[derive(Clone, Debug)]
    struct PowerCut {
        left: Arc<AtomicUsize>,
    }

    impl PowerCut {
        fn step(&self) -> io::Result<bool> {
            match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
                Ok(left) => Ok(left > 1),
                Err(_) => Err(io::Error::other("the power is off")),
            }
        }
        fn whole(&self, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
            if self.step()? { act() } else { Err(io::Error::other("the power went off")) }
        }
    }

    impl FileLayer for PowerCut {
        fn write_synced(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
            if self.step()? {
                return Disk.write_synced(path, bytes);
            }
            Disk.write_synced(path, &bytes[..bytes.len() / 2])?;
            Err(io::Error::other("the power went off"))
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.whole(|| Disk.rename(from, to))
        }
        fn remove(&self, path: &Path) -> io::Result<()> {
            self.whole(|| Disk.remove(path))
        }
        fn symlink(&self, target: &Path, link: &Path) -> io::Result<()> {
            self.whole(|| Disk.symlink(target, link))
        }
        fn sync_directory(&self, directory: &Path) -> io::Result<()> {
            self.whole(|| Disk.sync_directory(directory))
        }
    }

    fn names(directory: &Path) -> Vec<(String, String, bool)> {
        let store = DefinitionStore::new(directory.join("d"), directory.join("a"), Disk);
        let all = store.load_all(|path, error| panic!("{}: {error}", path.display())).unwrap();
        let body = |text: Vec<u8>| String::from_utf8(text).unwrap().split("-->\n\n").nth(1).unwrap().to_owned();
        all.into_iter().map(|stored| (stored.name, body(stored.text), stored.autostart)).collect()
    }

    /// Runs `change` with the power cut after every number of steps; what is left must be one of `allowed`.
    fn check_every_cut(
        change: impl Fn(&DefinitionStore<PowerCut>) -> io::Result<()>,
        allowed: &[&[(&str, &str, bool)]],
    ) {
        for steps in 1.. {
            let directory = tempfile::tempdir().unwrap();
            for name in ["d", "a"] {
                fs::create_dir(directory.path().join(name)).unwrap();
            }
            let (d, a) = (directory.path().join("d"), directory.path().join("a"));
            let before = DefinitionStore::new(d.clone(), a.clone(), Disk);
            before.save("vm", "<old/>").unwrap();
            before.set_autostart("vm", true).unwrap();
            let left = Arc::new(AtomicUsize::new(steps));
            let outcome = change(&DefinitionStore::new(d, a, PowerCut { left }));
            let found = names(directory.path());
            let matches = |expected: &&[(&str, &str, bool)]| {
                found.iter().map(|(name, xml, auto)| (name.as_str(), xml.as_str(), *auto)).eq(expected.iter().copied())
            };
            assert!(allowed.iter().any(matches), "cut at step {steps}: {found:?}");
            if outcome.is_ok() {
                assert!(steps > 3, "the change took {steps} steps");
                assert!(matches(&allowed[allowed.len() - 1]), "the finished change left {found:?}");
                return;
            }
        }
    }

    #[test]
    fn a_power_cut_at_any_step_leaves_the_old_or_the_new_definition() {
        check_every_cut(|store| store.save("vm", "<new/>"), &[&[("vm", "<old/>", true)], &[("vm", "<new/>", true)]]);
        check_every_cut(
            |store| store.save("other", "<x/>"),
            &[&[("vm", "<old/>", true)], &[("other", "<x/>", false), ("vm", "<old/>", true)]],
        );
        check_every_cut(|store| store.delete("vm"), &[&[("vm", "<old/>", true)], &[("vm", "<old/>", false)], &[]]);
        check_every_cut(
            |store| store.rename("vm", "neu", "<old2/>", true),
            &[
                &[("vm", "<old/>", true)],
                &[("neu", "<old2/>", false), ("vm", "<old/>", true)],
                &[("neu", "<old2/>", true), ("vm", "<old/>", true)],
                &[("neu", "<old2/>", true), ("vm", "<old/>", false)],
                &[("neu", "<old2/>", true)],
            ],
        );
    }
}
