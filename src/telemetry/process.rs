//! The process as Prometheus expects every process to show itself: memory, CPU, descriptors, start.
//!
//! Invariant: read at each scrape, from `/proc/self`; a figure that cannot be read is left out, never zero.

use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use rustix::process::{Resource, getrlimit};

/// `process_*`, without a prefix: the names are a convention of Prometheus, not ours.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        if let Some(stat) = Stat::read() {
            let cpu = ConstCounter::new(stat.cpu_seconds);
            put(&mut encoder, "process_cpu_seconds", "User and system CPU time spent", &cpu)?;
            let resident = ConstGauge::new(stat.resident_bytes);
            put(&mut encoder, "process_resident_memory_bytes", "Resident memory", &resident)?;
            let virtual_bytes = ConstGauge::new(stat.virtual_bytes);
            put(&mut encoder, "process_virtual_memory_bytes", "Virtual memory", &virtual_bytes)?;
            let threads = ConstGauge::new(stat.threads);
            put(&mut encoder, "process_threads", "Threads of the operating system", &threads)?;
            if let Some(started) = stat.start_seconds {
                let started = ConstGauge::new(started);
                put(&mut encoder, "process_start_time_seconds", "Start, in seconds since 1970", &started)?;
            }
        }
        if let Some(open) = open_descriptors() {
            put(&mut encoder, "process_open_fds", "Open file descriptors", &ConstGauge::new(open))?;
        }
        if let Some(limit) = getrlimit(Resource::Nofile).current {
            put(&mut encoder, "process_max_fds", "Limit of open file descriptors", &gauge(limit))?;
        }
        Ok(())
    }
}

fn put(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    metric: &impl EncodeMetric,
) -> Result<(), std::fmt::Error> {
    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
}

fn gauge(value: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

/// Clock ticks per second in `/proc`: USER_HZ is 100 on every architecture, whatever the kernel's own HZ is.
const USER_HZ: f64 = 100.0;

struct Stat {
    cpu_seconds: f64,
    resident_bytes: i64,
    virtual_bytes: i64,
    threads: i64,
    start_seconds: Option<f64>,
}

impl Stat {
    fn read() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        let status = fs::read_to_string("/proc/self/status").ok()?;
        Self::parse(&stat, &status, boot_seconds())
    }

    /// `stat` by the field numbers of proc(5), counted after the command's closing parenthesis, which ends field 2.
    fn parse(stat: &str, status: &str, boot: Option<f64>) -> Option<Self> {
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let seconds =
            |number: usize| fields.get(number - 3)?.parse::<f64>().ok().map(|ticks: f64| ticks / USER_HZ);
        // Memory comes from `status`, in kB, because `stat` counts pages and their size is another question.
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().trim_end_matches(" kB").parse::<i64>().ok()
        };
        Some(Self {
            cpu_seconds: seconds(14)? + seconds(15)?,
            start_seconds: boot.and_then(|boot| Some(boot + seconds(22)?)),
            threads: number("Threads")?,
            virtual_bytes: number("VmSize")? * 1024,
            resident_bytes: number("VmRSS")? * 1024,
        })
    }
}

/// When the machine booted, in seconds since 1970.
fn boot_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn open_descriptors() -> Option<i64> {
    // One of them is the directory being read.
    i64::try_from(fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_a_command_with_spaces_and_parentheses() {
        let tail: Vec<String> = (3..=24).map(|number| (number * 100).to_string()).collect();
        let status = "Name:\twindlass\nVmSize:\t    23 kB\nVmRSS:\t     7 kB\nThreads:\t5\n";
        let stat = Stat::parse(&format!("7 (a ) b) {}", tail.join(" ")), status, Some(1.0)).expect("whole");
        assert_eq!(stat.cpu_seconds.round(), 29.0);
        assert_eq!((stat.threads, stat.virtual_bytes, stat.resident_bytes), (5, 23 * 1024, 7 * 1024));
        assert_eq!(stat.start_seconds.map(f64::round), Some(23.0));
    }
}
