//! The program as its users meet it: exit codes, the one line on stderr, a daemon that starts, answers and stops.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A daemon starts in milliseconds; this is for a machine that does ten other things.
const START_DEADLINE: Duration = Duration::from_secs(30);

fn windlass() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
    command.env_clear();
    command
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    shown(&windlass().args(arguments).output().expect("the binary runs"))
}

fn shown(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A directory with the configuration of a daemon that touches nothing outside it.
struct Home {
    directory: tempfile::TempDir,
}

impl Home {
    fn new(more: &str) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let home = Self { directory };
        let data = home.path().join("data");
        let own = format!(
            "store.data_dir = {data:?}\nstore.free_floor = 0\nnode.name = \"test\"\nnode.standalone = true\nadmin.listen = \"127.0.0.1:0\"\n\
             registry.listen = \"127.0.0.1:0\"\nobject.listen = \"127.0.0.1:0\"\n\
             transport.listen = \"127.0.0.1:0\"\ncontrol.socket = {:?}\n",
            home.socket().display().to_string()
        );
        std::fs::write(home.config(), own + more).expect("writable");
        home
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn config(&self) -> PathBuf {
        self.path().join("windlass.toml")
    }

    fn socket(&self) -> PathBuf {
        self.path().join("w.sock")
    }

    fn serve(&self) -> Command {
        let mut command = windlass();
        command.arg("serve").arg("--config").arg(self.config());
        command
    }

    /// Runs a command that asks this home's daemon.
    fn ask(&self, command: &str) -> (Option<i32>, String, String) {
        let output = windlass().arg(command).arg("--json").arg("--socket").arg(self.socket()).output();
        shown(&output.expect("the binary runs"))
    }

    /// Starts the daemon and waits until it answers.
    fn start(&self) -> Running {
        let mut child =
            self.serve().stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the binary runs");
        let begun = Instant::now();
        while self.ask("status").0 != Some(0) {
            assert!(begun.elapsed() < START_DEADLINE, "the daemon does not answer");
            if let Some(status) = child.try_wait().expect("it is our child") {
                panic!(
                    "the daemon ended with {status}: {}",
                    shown(&child.wait_with_output().expect("its output")).2
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Running(child)
    }
}

/// Killed when a test fails in between.
struct Running(Child);

impl Running {
    fn stop(mut self) -> Option<i32> {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw).expect("a child has a pid");
        kill_process(pid, Signal::TERM).expect("it runs");
        self.0.wait().expect("it is our child").code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_daemon_starts_answers_and_stops_when_asked() {
    let home = Home::new("");
    let daemon = home.start();
    let (code, stats, _) = home.ask("status");
    assert_eq!(code, Some(0));
    let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
    assert_eq!(stats["node"], "test");
    for list in ["peers", "contents"] {
        let (code, entries, _) = home.ask(list);
        assert_eq!((code, entries.trim()), (Some(0), "[]"), "{list}");
    }
    assert_eq!(daemon.stop(), Some(0));
    assert!(!home.socket().exists(), "the socket is gone");
}

#[test]
fn a_second_daemon_in_the_same_place_says_what_is_taken() {
    let home = Home::new("");
    let _daemon = home.start();
    let (code, _, error) = shown(&home.serve().output().expect("the binary runs"));
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("windlass: ") && error.contains("w.sock"), "{error}");
}

#[test]
fn a_port_in_use_is_named_with_its_key() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("it is bound").to_string();
    let home = Home::new("");
    let output = home.serve().env("WINDLASS_ADMIN__LISTEN", &address).output().expect("the binary runs");
    let (code, _, error) = shown(&output);
    assert_eq!(code, Some(1));
    assert!(error.contains(&address) && error.contains("admin.listen"), "{error}");
}

#[test]
fn bad_configuration_is_64_and_one_line() {
    let home = Home::new("node.zoen = \"a\"\n");
    let (code, _, error) = shown(&home.serve().output().expect("the binary runs"));
    assert_eq!(code, Some(64));
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.starts_with("windlass: ") && error.contains("node.zoen"), "{error}");
}

#[test]
fn check_prints_what_takes_effect() {
    let home = Home::new("");
    let output = home.serve().arg("--check").env("WINDLASS_NODE__ZONE", "z1").output();
    let (code, text, error) = shown(&output.expect("the binary runs"));
    assert_eq!(code, Some(0), "{error}");
    assert!(text.contains("zone = \"z1\"") && text.contains("name = \"test\""), "{text}");
    assert!(!home.socket().exists(), "nothing was started");
}

#[test]
fn wrong_usage_is_2_and_help_is_0() {
    assert_eq!(run(&["serve", "--no-such-flag"]).0, Some(2));
    assert_eq!(run(&[]).0, Some(2));
    let (code, help, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    for command in ["serve", "status", "peers", "contents", "certs", "doctor", "warm", "wire", "unwire"] {
        assert!(help.contains(command), "{command} is not in the help");
    }
    assert!(run(&["--version"]).1.starts_with("windlass "));
}

#[test]
fn without_a_daemon_the_cure_is_named() {
    let home = Home::new("");
    let (code, _, error) = home.ask("status");
    assert_eq!(code, Some(1));
    assert!(
        error.starts_with("windlass: no daemon answers at ") && error.contains("windlass serve"),
        "{error}"
    );
}

/// The paths below a directory, and what the files say.
fn picture(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut left = vec![directory.to_owned()];
    while let Some(path) = left.pop() {
        if path.is_dir() {
            left.extend(
                std::fs::read_dir(&path).expect("readable").map(|entry| entry.expect("an entry").path()),
            );
        }
        found.push((path.clone(), std::fs::read_to_string(&path).unwrap_or_default()));
    }
    found.sort();
    found
}

#[test]
fn containerd_is_wired_to_a_mirror_that_answers_and_unwired_again() {
    let port =
        TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("it is bound").port();
    let mirror = format!("127.0.0.1:{port}");
    let home = Home::new(
        "[[registry.origins]]\nname = \"reg.example\"\n[[registry.origins]]\nname = \"docker.io\"\n",
    );
    let certs = home.path().join("certs.d");
    std::fs::create_dir_all(certs.join("reg.example")).expect("writable");
    let foreign = "server = \"https://reg.example\"\n[host.\"https://theirs\"]\n";
    std::fs::write(certs.join("reg.example/hosts.toml"), foreign).expect("writable");
    let before = picture(&certs);
    let wire = |arguments: &[&str]| {
        let mut command = windlass();
        command.args(arguments).arg("--certs-d").arg(&certs).env("WINDLASS_REGISTRY__LISTEN", &mirror);
        shown(&command.env("WINDLASS_CONFIG", home.config()).output().expect("the binary runs"))
    };

    let (code, _, error) = wire(&["wire", "--wait", "0s"]);
    assert_eq!(code, Some(1));
    assert!(error.contains("nothing was written"), "{error}");
    assert_eq!(picture(&certs), before);

    let serve = home.serve().env("WINDLASS_REGISTRY__LISTEN", &mirror).stderr(Stdio::null()).spawn();
    let _daemon = Running(serve.expect("the binary runs"));
    let (code, text, error) = wire(&["wire", "--json"]);
    assert_eq!(code, Some(0), "{error}");
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["changes"].as_array().map(Vec::len), Some(2), "{text}");
    let hub = std::fs::read_to_string(certs.join("docker.io/hosts.toml")).expect("it is written");
    assert!(hub.contains("server = \"https://registry-1.docker.io\"") && hub.contains(&mirror), "{hub}");

    assert_eq!(wire(&["unwire"]).0, Some(0));
    assert_eq!(picture(&certs), before);
}
