//! Memory and descriptors of this process, as the operating system reports them.

/// Resources in use; `None` if the system does not tell.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Open file descriptors.
    pub descriptors: Option<u64>,
    /// `RLIMIT_NOFILE`.
    pub descriptors_max: Option<u64>,
    /// Bytes of resident memory.
    pub resident_bytes: Option<u64>,
    /// Bytes of virtual memory.
    pub virtual_bytes: Option<u64>,
}

impl Process {
    /// As it is now.
    pub fn now() -> Self {
        let memory = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let mut pages = memory.split_ascii_whitespace().map(|field| field.parse::<u64>().ok());
        let mut bytes = || pages.next().flatten().map(|pages| pages * rustix::param::page_size() as u64);
        let (virtual_bytes, resident_bytes) = (bytes(), bytes());
        Self {
            // Minus the descriptor that reads the folder.
            descriptors: std::fs::read_dir("/proc/self/fd")
                .ok()
                .map(|folder| (folder.count() as u64).saturating_sub(1)),
            descriptors_max: rustix::process::getrlimit(rustix::process::Resource::Nofile).current,
            resident_bytes,
            virtual_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_descriptors() {
        let process = Process::now();
        assert!(process.resident_bytes.is_some_and(|bytes| bytes > 100_000));
        assert!(process.virtual_bytes >= process.resident_bytes);
        let _more = [std::fs::File::open("/dev/null").unwrap(), std::fs::File::open("/dev/null").unwrap()];
        assert!(Process::now().descriptors > process.descriptors);
    }
}
