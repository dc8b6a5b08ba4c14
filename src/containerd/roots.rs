//! `config_path`: the directories in which containerd looks for a registry's `hosts.toml`, and the one that it finds.
//!
//! Reading only. A path may name several directories, with colons between them: nodeadm's does.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The name of the directory that stands for every registry without one of its own.
pub const DEFAULT: &str = "_default";

/// The directories of a `config_path`, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots(Vec<PathBuf>);

/// The directory that containerd takes for a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// The registry's own.
    Own(PathBuf),
    /// `_default`, for want of its own in that root or one before.
    Default(PathBuf),
    Nothing,
}

impl FromStr for Roots {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let roots: Vec<PathBuf> =
            text.split(':').filter(|part| !part.is_empty()).map(PathBuf::from).collect();
        match roots.iter().find(|root| root.is_relative()) {
            Some(root) => Err(format!("{} is not an absolute path", root.display())),
            None if roots.is_empty() => Err("no directory is named".into()),
            None => Ok(Self(roots)),
        }
    }
}

impl fmt::Display for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: Vec<_> = self.0.iter().map(|root| root.display().to_string()).collect();
        f.write_str(&shown.join(":"))
    }
}

impl Roots {
    /// The directories, first looked at first.
    #[must_use]
    pub fn paths(&self) -> &[PathBuf] {
        &self.0
    }

    /// Where a directory is made for a registry that has none.
    #[must_use]
    pub fn first(&self) -> &Path {
        // At least one, or it would not have been parsed.
        self.0.first().map_or_else(|| Path::new("/"), PathBuf::as_path)
    }

    /// The same directories as they are seen from where the node's root is mounted at `host_root`.
    #[must_use]
    pub fn below(&self, host_root: &Path) -> Self {
        Self(self.0.iter().map(|root| below(host_root, root)).collect())
    }

    /// The directory containerd takes: in each root in turn `host_port_`, `host:port`, `_default`, whichever exists.
    #[must_use]
    pub fn find(&self, registry: &str) -> Found {
        for root in &self.0 {
            let own = [underscored(registry), registry.to_owned()];
            if let Some(directory) = own.iter().map(|name| root.join(name)).find(|path| path.exists()) {
                return Found::Own(directory);
            }
            let default = root.join(DEFAULT);
            if default.exists() {
                return Found::Default(default);
            }
        }
        Found::Nothing
    }
}

/// `path` of the node as it is seen from where the node's root is mounted at `host_root`.
#[must_use]
pub fn below(host_root: &Path, path: &Path) -> PathBuf {
    host_root.join(path.strip_prefix("/").unwrap_or(path))
}

/// `host:port` as file systems without colons spell it.
fn underscored(registry: &str) -> String {
    match registry.rsplit_once(':') {
        Some((host, port)) => format!("{host}_{port}_"),
        None => registry.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_directory_that_exists_is_taken() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let (one, two) = (scratch.path().join("one"), scratch.path().join("two"));
        let roots: Roots = format!("{}:{}", one.display(), two.display()).parse().expect("two roots");
        assert_eq!(roots.find("a:5000"), Found::Nothing);
        std::fs::create_dir_all(two.join("a:5000")).expect("writable");
        assert_eq!(roots.find("a:5000"), Found::Own(two.join("a:5000")));
        std::fs::create_dir_all(one.join(DEFAULT)).expect("writable");
        assert_eq!(roots.find("a:5000"), Found::Default(one.join(DEFAULT)));
        std::fs::create_dir_all(one.join("a_5000_")).expect("writable");
        assert_eq!(roots.find("a:5000"), Found::Own(one.join("a_5000_")));
    }

    #[test]
    fn a_path_is_absolute_and_colons_divide_it() {
        assert!(Roots::from_str("certs.d").is_err());
        assert!(Roots::from_str("").is_err());
        let roots = Roots::from_str("/a:/b").expect("two");
        assert_eq!(roots.to_string(), "/a:/b");
        assert_eq!(roots.below(Path::new("/host")).to_string(), "/host/a:/host/b");
    }
}
