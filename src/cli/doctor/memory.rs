//! How much memory this process may still take: the machine's, and every cgroup's around it.
//!
//! Called by `model.rs`.

use std::{fs, path::Path};

/// Bytes that may be taken now; `None` where the system does not tell.
pub fn available_bytes(root: &Path) -> Option<u64> {
    let machine = mem_available(&fs::read_to_string(root.join("proc/meminfo")).ok()?)?;
    Some(cgroup_bytes(root).map_or(machine, |limit| limit.min(machine)))
}

/// `MemAvailable` of `/proc/meminfo`, which counts caches that can be dropped.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// What the tightest cgroup (version 2) leaves. Inside a container its own is the root.
fn cgroup_bytes(root: &Path) -> Option<u64> {
    let mount = root.join("sys/fs/cgroup");
    let own = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = |cgroup: &Path| {
        let limit = number(&cgroup.join("memory.max"))?;
        let used = number(&cgroup.join("memory.current")).unwrap_or(0);
        let files = file_bytes(&fs::read_to_string(cgroup.join("memory.stat")).unwrap_or_default());
        Some(limit.saturating_sub(used.saturating_sub(files)))
    };
    let folder = mount.join(own);
    folder.ancestors().take_while(|cgroup| cgroup.starts_with(&mount)).filter_map(left).min()
}

/// What `memory.stat` counts as copies of files, which are dropped when memory is short.
fn file_bytes(stat: &str) -> u64 {
    let fields = stat.lines().filter_map(|line| line.split_once(' '));
    let files = fields.filter(|(name, _)| ["inactive_file", "active_file"].contains(name));
    files.filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = root.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        root
    }

    #[test]
    fn the_tightest_cgroup_or_the_machine_decides() {
        let meminfo = ("proc/meminfo", "MemTotal: 4096 kB\nMemAvailable:    2048 kB\n");
        let bytes = |files: &[(&str, &str)]| available_bytes(machine(files).path());
        assert_eq!(bytes(&[]), None);
        assert_eq!(bytes(&[meminfo]), Some(2 << 20));
        let (own, tight) = (("proc/self/cgroup", "0::/a/b\n"), ("sys/fs/cgroup/a/memory.max", "1000\n"));
        let used = ("sys/fs/cgroup/a/memory.current", "400\n");
        let loose = ("sys/fs/cgroup/a/b/memory.max", "max\n");
        assert_eq!(bytes(&[meminfo, own, tight, used, loose]), Some(600));
        let stat = ("sys/fs/cgroup/a/memory.stat", "anon 100\nfile 300\ninactive_file 200\nactive_file 50\n");
        assert_eq!(bytes(&[meminfo, own, tight, used, stat]), Some(850), "copies of files are dropped");
        assert_eq!(bytes(&[meminfo, own, loose]), Some(2 << 20));
        assert_eq!(bytes(&[meminfo, ("sys/fs/cgroup/memory.max", "5000")]), Some(5000));
    }
}
