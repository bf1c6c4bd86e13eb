//! How much memory is available to this process, as the system tells it when asked: in all, and within its
//! control groups (cgroups), of either version. It owns nothing.

use std::fs;
use std::path::{Path, PathBuf};

/// What is available.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Available {
    /// So many bytes.
    pub bytes: u64,
    /// Says who.
    pub source: String,
}

/// What is available to this process; None: that can't be found out.
pub fn available() -> Option<Available> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let system = mem_available(&read("/proc/meminfo"))
        .map(|bytes| Available { bytes, source: "MemAvailable in /proc/meminfo".into() });
    let groups = groups(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"));
    let allowed = groups.iter().flat_map(|group| group.allowed(|path| fs::read_to_string(path).ok()));
    system.into_iter().chain(allowed).min_by_key(|available| available.bytes)
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

/// A cgroup that accounts for memory, in a mounted hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    unified: bool,
    mount: PathBuf,
    dir: PathBuf,
}

/// The files of one version: limits, what is in use, and the part of that which can be taken back at once.
const UNIFIED: (&[&str], &str, &str) = (&["memory.max", "memory.high"], "memory.current", "inactive_file");
const LEGACY: (&[&str], &str, &str) =
    (&["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_inactive_file");

impl Group {
    // What this group and those around it still allow, each limit by itself.
    fn allowed(&self, read: impl Fn(&Path) -> Option<String>) -> Vec<Available> {
        let (limits, usage, idle) = if self.unified { UNIFIED } else { LEGACY };
        let number = |path: &Path| read(path)?.trim().parse::<u64>().ok();
        let mut all = Vec::new();
        for dir in self.dir.ancestors().take_while(|dir| dir.starts_with(&self.mount)) {
            let Some(used) = number(&dir.join(usage)) else { continue };
            let stat = read(&dir.join("memory.stat")).unwrap_or_default();
            let idle = stat.lines().find_map(|line| line.strip_prefix(idle)?.trim().parse::<u64>().ok());
            let used = used.saturating_sub(idle.unwrap_or(0));
            for file in limits.iter().map(|name| dir.join(name)) {
                // "max" is no number, and no limit.
                if let Some(limit) = number(&file) {
                    let bytes = limit.saturating_sub(used);
                    all.push(Available { bytes, source: file.display().to_string() });
                }
            }
        }
        all
    }
}

// The groups of this process, from /proc/self/cgroup and /proc/self/mountinfo.
fn groups(cgroup: &str, mountinfo: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in cgroup.lines() {
        // 0::/path in version 2, 4:memory:/path in version 1.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let unified = controllers.is_empty();
        if !unified && !controllers.split(',').any(|controller| controller == "memory") {
            continue;
        }
        let mounts = mountinfo.lines().filter_map(mount);
        let ours = |kind: &str, options: &str| match unified {
            true => kind == "cgroup2",
            false => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
        };
        for (_, root, at, _) in mounts.filter(|(kind, _, _, options)| ours(kind, options)) {
            // In a container the mount may begin at the group itself.
            let Ok(rest) = Path::new(path).strip_prefix(root) else { continue };
            groups.push(Group { unified, mount: at.into(), dir: Path::new(at).join(rest) });
        }
    }
    groups
}

// Of a line of mountinfo: the type, the root within the file system, the mount point, the options of the file
// system.
fn mount(line: &str) -> Option<(&str, &str, &str, &str)> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(3);
    let (root, at) = (front.next()?, front.next()?);
    let mut back = back.split(' ');
    let (kind, options) = (back.next()?, back.nth(1)?);
    Some((kind, root, at, options))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const MIB: u64 = 1 << 20;

    #[test]
    fn meminfo_is_understood() {
        let text =
            "MemTotal:       24684084 kB\nMemFree:  1 kB\nMemAvailable:   24188916 kB\nBuffers: 2 kB\n";
        assert_eq!(mem_available(text), Some(24188916 * 1024));
        assert_eq!(mem_available("MemTotal: 3 kB\n"), None);
        assert_eq!(mem_available("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn groups_of_both_versions_are_found() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:3 - cgroup cgroup rw,cpu\n\
                      35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        let ours = "5:cpu,cpuacct:/x\n4:memory:/a/b\n1:name=systemd:/\n0::/c\n";
        let found = groups(ours, mounts);
        let group = |unified, mount: &str, dir: &str| Group { unified, mount: mount.into(), dir: dir.into() };
        let (old, new) = ("/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified");
        assert_eq!(
            found,
            [group(false, old, "/sys/fs/cgroup/memory/a/b"), group(true, new, "/sys/fs/cgroup/unified/c")]
        );
        // In a container: its own group is the root of what it sees.
        let mounts = "9 8 0:26 /pod/box /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n";
        assert_eq!(groups("0::/pod/box/in\n", mounts)[0].dir, Path::new("/sys/fs/cgroup/in"));
        assert_eq!(groups("0::/other\n", mounts), []);
        assert_eq!(groups("", ""), []);
    }

    fn files(of: &[(&str, &str)]) -> HashMap<PathBuf, String> {
        of.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_string())).collect()
    }

    fn allowed(group: &Group, files: &HashMap<PathBuf, String>) -> Option<Available> {
        group.allowed(|path| files.get(path).cloned()).into_iter().min_by_key(|available| available.bytes)
    }

    #[test]
    fn the_narrowest_group_counts() {
        let group = Group { unified: true, mount: "/cg".into(), dir: "/cg/a/b".into() };
        let mut all = files(&[
            ("/cg/a/b/memory.max", "max\n"),
            ("/cg/a/b/memory.high", "104857600\n"),
            ("/cg/a/b/memory.current", "62914560\n"),
            ("/cg/a/b/memory.stat", "anon 1\ninactive_anon 7\ninactive_file 10485760\n"),
            ("/cg/a/memory.max", "209715200\n"),
            ("/cg/a/memory.current", "188743680\n"),
        ]);
        let narrow = allowed(&group, &all).unwrap();
        assert_eq!((narrow.bytes, narrow.source.as_str()), (20 * MIB, "/cg/a/memory.max"));
        all.insert("/cg/a/memory.max".into(), "max\n".into());
        let own = allowed(&group, &all).unwrap();
        assert_eq!((own.bytes, own.source.as_str()), (50 * MIB, "/cg/a/b/memory.high"));
        // More in use than is allowed by now.
        all.insert("/cg/a/b/memory.high".into(), "4096\n".into());
        assert_eq!(allowed(&group, &all).unwrap().bytes, 0);
        assert_eq!(allowed(&group, &HashMap::new()), None);
    }

    #[test]
    fn version_1_has_other_names() {
        let group = Group { unified: false, mount: "/cg".into(), dir: "/cg/a".into() };
        let all = files(&[
            ("/cg/a/memory.limit_in_bytes", "104857600\n"),
            ("/cg/a/memory.usage_in_bytes", "73400320\n"),
            ("/cg/a/memory.stat", "inactive_file 1\ntotal_inactive_file 31457280\n"),
            ("/cg/memory.limit_in_bytes", "9223372036854771712\n"),
            ("/cg/memory.usage_in_bytes", "73400320\n"),
        ]);
        let own = allowed(&group, &all).unwrap();
        assert_eq!((own.bytes, own.source.as_str()), (60 * MIB, "/cg/a/memory.limit_in_bytes"));
    }

    #[test]
    fn this_system_says_something() {
        let here = available().unwrap();
        assert!(here.bytes > 0 && here.source.starts_with(['M', '/']), "{here:?}");
    }
}
