//! A VM that is added while the host runs: one `[[vm]]` section, judged by the same code as the file.

use alloc::{
    borrow::ToOwned,
    format,
    string::{String, ToString},
    vec::Vec,
};

use super::{Config, Environment, FileFacts, HostConfig, Pools, Severity, VmConfig, check, parse};

/// What the problems call the text.
const NAME: &str = "vm-create";

/// Why a VM cannot be added. The texts are for people, a problem a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddError {
    /// The text is no good, or names files that are not there.
    Bad(String),
    /// The host has not enough memory left for it.
    NoMemory(String),
}

/// What is there, but for the memory.
struct FilesOnly<'a>(&'a dyn Environment);

impl Environment for FilesOnly<'_> {
    fn memory_bytes(&self) -> Option<u64> {
        None
    }

    fn processors(&self) -> Option<usize> {
        self.0.processors()
    }

    fn pools(&self) -> Option<&Pools> {
        self.0.pools()
    }

    fn file(&self, path: &str) -> Result<FileFacts, String> {
        self.0.file(path)
    }
}

/// Reads the definition of one VM and compares it with what is there; `environment` says what memory is left.
///
/// # Errors
/// It is not exactly one `[[vm]]` section, something in it is wrong, or the memory does not suffice.
pub fn parse_added(text: &str, environment: &dyn Environment) -> Result<VmConfig, AddError> {
    let bad = |text: &str| Err(AddError::Bad(text.to_owned()));
    let mut config = parse(NAME, text.as_bytes());
    if config.host != HostConfig::default() {
        return bad("[host] cannot be changed while the host runs; give one [[vm]] section alone");
    }
    check(&mut config, &FilesOnly(environment));
    if config.has_errors() {
        return Err(AddError::Bad(errors(&config)));
    }
    match config.vms.len() {
        1 => {}
        0 => return bad("there is no VM in it; give one [[vm]] section"),
        _ => return bad("there are several VMs in it; create one at a time"),
    }
    check(&mut config, environment);
    match config.vms.pop() {
        Some(vm) => Ok(vm),
        None => Err(AddError::NoMemory(errors(&config))),
    }
}

/// The errors, one a line. The key says where, since the shell writes the section itself; the place in the text is told where there is none.
fn errors(config: &Config) -> String {
    let errors = config.problems.iter();
    let lines: Vec<String> = errors
        .filter(|problem| problem.severity == Severity::Error)
        .map(|problem| match problem.key.as_str() {
            "" => problem.to_string(),
            key => format!("{key}: {}", problem.message),
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FileKind;

    struct Host;

    impl Environment for Host {
        fn memory_bytes(&self) -> Option<u64> {
            Some(256 << 20)
        }
        fn processors(&self) -> Option<usize> {
            Some(2)
        }
        fn file(&self, path: &str) -> Result<FileFacts, String> {
            match path {
                "k" => Ok(FileFacts {
                    bytes: 1000,
                    kind: FileKind::Elf,
                }),
                _ => Err("is not in the image".to_owned()),
            }
        }
    }

    /// Of the VMs of the file, those that start with the host share its memory; the others get what is left then.
    #[test]
    fn memory_is_given_to_those_that_start_with_the_host() {
        let vm = |name: &str, autostart: bool| {
            format!(
                "[[vm]]\nname = \"{name}\"\nmemory = \"160M\"\nautostart = {autostart}\nboot = {{ kernel = \"k\" }}\n"
            )
        };
        let judge = |text: String| {
            let mut config = parse("p", text.as_bytes());
            check(&mut config, &Host);
            config.disabled
        };
        assert_eq!(judge(vm("a", true) + &vm("b", true)), ["b"]);
        let off: [&str; 0] = [];
        assert_eq!(
            judge(vm("a", true) + &vm("b", false) + &vm("c", false)),
            off
        );
        assert_eq!(judge(vm("a", false).replace("160M", "512M")), ["a"]);
    }

    #[test]
    fn files_of_the_host_have_to_be_there() {
        let vm = "[[vm]]\nname = \"web\"\nmemory = \"64M\"\nboot = { kernel = \"k\" }\n";
        let mut config = parse(
            "p",
            format!("[host]\nfiles = [\"k\", \"gone\"]\n{vm}").as_bytes(),
        );
        check(&mut config, &Host);
        assert_eq!(config.host.files.len(), 1);
        assert_eq!(errors(&config), "host.files: gone: is not in the image");
        for files in ["7", "[7]", "[\"\"]"] {
            let config = parse("p", format!("[host]\nfiles = {files}\n{vm}").as_bytes());
            assert!(errors(&config).contains("host.files: "), "{files}");
        }
    }

    #[test]
    fn a_vm_is_added() {
        let text =
            "[[vm]]\nname = \"web\"\nmemory = \"64M\"\nvcpus = 8\nboot = { kernel = \"k\" }\n";
        let vm = parse_added(text, &Host).unwrap();
        assert_eq!((vm.name.as_str(), vm.memory), ("web", 64 << 20));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let vm = "[[vm]]\nname = \"web\"\nmemory = \"64M\"\nboot = { kernel = \"k\" }\n";
        for (text, says) in [
            (String::new(), "no VM is defined"),
            (format!("{vm}{}", vm.replace("web", "b")), "several VMs"),
            (format!("[host]\nfigures = true\n{vm}"), "[host] cannot be"),
            (vm.replace("64M", "1M"), "vm.memory: \"1M\" is"),
            (
                vm.replace("64M", "1M").replace("\"k\"", "7"),
                "\nvm.boot.kernel: ",
            ),
            (
                vm.replace("\"k\"", "\"x\""),
                "vm.boot.kernel: x: is not in the image",
            ),
            (vm.replace("name", "nam"), "did you mean name?"),
            ("[[vm]".to_owned(), "vm-create:1:"),
        ] {
            match parse_added(&text, &Host) {
                Err(AddError::Bad(why)) => assert!(why.contains(says), "{why}"),
                other => panic!("{text}: {other:?}"),
            }
        }
        let text = vm.replace("64M", "512M");
        match parse_added(&text, &Host) {
            Err(AddError::NoMemory(why)) => {
                assert!(why.contains("512 MiB is more than the host has"), "{why}");
            }
            other => panic!("{other:?}"),
        }
    }
}
