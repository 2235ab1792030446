use super::*;
use crate::console::DEFAULT_ESCAPE;
use proptest::prelude::*;
use std::collections::BTreeMap;

const GOOD: &str = r#"[host]
on-fault = "reset"
after-last-vm = "halt"
log-level = "debug"
console-escape = "ctrl-a"
figures = true

[[vm]]
name = "linux"
vcpus = 2
memory = "1G"
restart = "on-failure"
focus = true
boot = { kernel = "vmlinuz", initrd = "initrd.img", cmdline = "console=ttyS0 quiet" }

[[vm]]
name = "stub-2"
memory = 64
console = false

[vm.boot]
kernel = "stub.elf"
"#;

fn problems(text: &str) -> Vec<String> {
    let config = parse("plinth.toml", text.as_bytes());
    config.problems.iter().map(ToString::to_string).collect()
}

/// A file with one VM, with `line` added to it or in place of the line with the same key.
fn with(line: &str) -> String {
    let key = |line: &str| line.split('=').next().unwrap_or_default().trim().to_owned();
    let defaults = [
        "name = \"a\"",
        "memory = \"16M\"",
        "boot = { kernel = \"k\" }",
    ];
    let mut text = "[[vm]]\n".to_owned();
    for default in defaults.iter().filter(|d| key(d) != key(line)) {
        text += &format!("{default}\n");
    }
    text + line + "\n"
}

fn only_problem(line: &str) -> String {
    let config = parse("p", with(line).as_bytes());
    assert_eq!(config.problems.len(), 1, "{line}: {:?}", config.problems);
    config.problems[0].to_string()
}

#[test]
fn the_control_channel_can_be_turned_off() {
    let config = parse("p", b"[host]\ncontrol = false\n");
    let is_wrong = |config: &Config| config.problems.iter().any(|p| p.key == "host.control");
    assert!(!config.host.control && !is_wrong(&config));
    let config = parse("p", b"[host]\ncontrol = \"off\"\n");
    assert!(config.host.control && is_wrong(&config));
}

#[test]
fn a_good_file_has_no_problems() {
    let config = parse("plinth.toml", GOOD.as_bytes());
    assert_eq!(config.problems, []);
    assert_eq!(
        config.host,
        HostConfig {
            on_fault: OnFault::Reset,
            after_last_vm: AfterLastVm::Halt,
            log_level: LogLevel::Debug,
            console_escape: 1,
            figures: true,
            console_frame: None,
            files: Vec::new(),
            pools: Pools::default(),
            control: true,
        }
    );
    let [linux, stub] = &config.vms[..] else {
        panic!("{:?}", config.vms);
    };
    assert_eq!(
        (linux.name.as_str(), linux.vcpus, linux.memory),
        ("linux", 2, 1 << 30)
    );
    assert_eq!(
        (linux.restart, linux.console, linux.focus),
        (Restart::OnFailure, ConsoleKind::Serial, true)
    );
    let boot = Boot {
        kernel: Some("vmlinuz".to_owned()),
        initrd: Some("initrd.img".to_owned()),
        modules: Vec::new(),
        cmdline: "console=ttyS0 quiet".to_owned(),
        ..linux.boot.clone()
    };
    assert_eq!(linux.boot, boot);
    assert_eq!(linux.boot.firmware, None);
    assert_eq!(
        (stub.name.as_str(), stub.vcpus, stub.memory),
        ("stub-2", 1, 64 << 20)
    );
    assert_eq!(
        (stub.restart, stub.console, stub.focus),
        (Restart::Never, ConsoleKind::None, false)
    );
    assert_eq!(
        (stub.boot.initrd.as_ref(), stub.boot.cmdline.as_str()),
        (None, "")
    );
    assert_eq!(config.report(), "plinth.toml: 2 VMs can start\n");
}

/// The example in docs/CONFIGURATION.md is right.
#[test]
fn the_documented_file_has_no_problems() {
    let page = include_str!("../../../../docs/CONFIGURATION.md");
    let example = page.split("```").nth(1).unwrap();
    let config = parse("p", example.trim_start_matches("toml").as_bytes());
    assert_eq!(config.report(), "p: 2 VMs can start\n");
}

#[test]
fn a_file_without_host_has_the_defaults() {
    let config = parse("p", with("vcpus = 16").as_bytes());
    assert_eq!(
        (config.problems.len(), config.host.clone()),
        (0, HostConfig::default())
    );
    assert_eq!(config.host.console_escape, 0x1d);
}

#[test]
fn problems_name_file_line_column_key_and_what_is_allowed() {
    let text = GOOD.replace("vcpus = 2", "vcpus = 17");
    assert_eq!(
        problems(&text),
        ["plinth.toml:10:9: error: VM linux: vm.vcpus: 17 is out of range; allowed: 1 to 16"]
    );
    let text = GOOD.replace("memory = 64", "memory = \"64T\"");
    assert_eq!(
        problems(&text),
        [
            "plinth.toml:18:10: error: VM stub-2: vm.memory: \"64T\" is too much; \
          allowed: 4 MiB to 1 TiB, in steps of 2 MiB"
        ]
    );
}

#[test]
fn a_bad_vm_disables_that_vm_only() {
    let config = parse("p", GOOD.replace("vcpus = 2", "vcpus = 0").as_bytes());
    assert_eq!(config.vms.len(), 1);
    assert_eq!(
        (config.vms[0].name.as_str(), &config.disabled[..]),
        ("stub-2", &["linux".to_owned()][..])
    );
    assert!(config.has_errors());
    assert!(
        config
            .report()
            .ends_with("p: 1 VM can start, disabled: linux\n")
    );
}

#[test]
fn bad_values_are_refused_with_what_is_allowed() {
    let cases = [
        (
            "name = \"Linux\"",
            "is not a name; allowed: 1 to 32 of a to z, 0 to 9 and -",
        ),
        ("name = \"\"", "is not a name"),
        ("name = \"a\\u001b[31m\"", "\"a\\u{1b}[31m\" is not a name"),
        (
            "name = 3",
            "vm.name: must be a string; found a whole number",
        ),
        (
            "vcpus = \"2\"",
            "vm.vcpus: must be a whole number; found a string",
        ),
        ("vcpus = -1", "-1 is out of range"),
        (
            "vcpus = 0x100000000000000000",
            "is out of range; allowed: 1 to 16",
        ),
        ("vcpus = 1.5", "found a number with a point"),
        (
            "memory = \"256\"",
            "is not a size: write a number with M, G or T",
        ),
        ("memory = \"M\"", "is not a size"),
        ("memory = \"-1G\"", "is not a size"),
        ("memory = \"99999999999999999999G\"", "is too much"),
        ("memory = 99999999999999999999", "is too much"),
        ("memory = -1", "-1 is too little"),
        (
            "memory = \"2M\"",
            "\"2M\" is too little; allowed: 4 MiB to 1 TiB, in steps of 2 MiB",
        ),
        ("memory = 17", "17 is not a whole number of steps"),
        (
            "memory = true",
            "must be a size like \"256M\", or a number of MiB; found true or false",
        ),
        (
            "restart = \"sometimes\"",
            "allowed: \"never\", \"on-failure\", \"always\"",
        ),
        (
            "console = \"no\"",
            "vm.console: \"no\" is unknown; allowed: true, false, \"display\"",
        ),
        (
            "boot = \"vmlinuz\"",
            "vm.boot: must be a table; found a string",
        ),
        (
            "boot = {}",
            "vm.boot.kernel: missing; a VM boots a kernel, or firmware",
        ),
        (
            "boot = { kernel = \"k\", variables = \"v\" }",
            "vm.boot.variables: is for a firmware, and there is none",
        ),
        (
            "boot = { kernel = \"k\", vga-rom = \"v\" }",
            "vm.boot.vga-rom: is for a firmware, and there is none",
        ),
        (
            "display = \"vga\"",
            "vm.display: \"vga\" is unknown; allowed: \"none\", \"vga-text\", \"ramfb\"",
        ),
        (
            "console = 1",
            "vm.console: must be true, false or \"display\"",
        ),
        (
            "display = \"ramfb\"\nconsole = \"display\"",
            "vm.console: only text can be shown; write display = \"vga-text\", too",
        ),
        (
            "boot = { firmware = \"f\", initrd = \"i\" }",
            "vm.boot.initrd: is for a kernel, and there is none",
        ),
        (
            "boot = { firmware = true }",
            "vm.boot.firmware: must be a string",
        ),
        (
            "boot = { kernel = \"\" }",
            "vm.boot.kernel: \"\" is not a file's path",
        ),
        ("boot = { kernel = \"dir/\" }", "is not a file's path"),
        (
            "boot = { kernel = \"k\", initrd = 1 }",
            "vm.boot.initrd: must be a string",
        ),
        (
            "boot = { kernel = \"k\", cmdline = \"a\\nb\" }",
            "has a control character",
        ),
        ("focus = 1", "vm.focus: must be true or false"),
        (
            "console = false\nfocus = true",
            "a VM with console = false can't be shown",
        ),
    ];
    for (line, expected) in cases {
        let problem = only_problem(line);
        assert!(problem.contains(expected), "{line}: {problem}");
        assert_eq!(parse("p", with(line).as_bytes()).vms, [], "{line}");
    }
}

#[test]
fn a_display_can_be_the_console() {
    let text = with("display = \"vga-text\"\nconsole = \"display\"");
    let config = parse("p", text.as_bytes());
    let vm = config.vms.first().expect("a VM");
    assert_eq!(
        (vm.display, vm.console),
        (DisplayKind::VgaText, ConsoleKind::Display)
    );
    let config = parse("p", with("display = \"ramfb\"").as_bytes());
    let vm = config.vms.first().expect("a VM");
    assert_eq!(
        (vm.display, vm.console),
        (DisplayKind::Ramfb, ConsoleKind::Serial)
    );
}

#[test]
fn missing_keys_are_named() {
    let all = problems("[[vm]]\nvcpus = 1\n");
    assert_eq!(
        all,
        [
            "plinth.toml:1:1: error: VM #1: vm.name: missing",
            "plinth.toml:1:1: error: VM #1: vm.memory: missing; write for example memory = \"256M\"",
            "plinth.toml:1:1: error: VM #1: vm.boot: missing; write for example \
             boot = { kernel = \"vmlinuz\" }",
        ]
    );
}

#[test]
fn long_values_are_refused() {
    let long = "x".repeat(MAX_CMDLINE + 1);
    let problem = only_problem(&format!(
        "boot = {{ kernel = \"k\", cmdline = \"{long}\" }}"
    ));
    assert!(
        problem.contains("has 2048 bytes; allowed: up to 2047"),
        "{problem}"
    );
    let fits = &long[1..];
    assert_eq!(
        problems(&with(&format!(
            "boot = {{ kernel = \"k\", cmdline = \"{fits}\" }}"
        ))),
        [""; 0]
    );
    let problem = only_problem(&format!("name = \"{}\"", &long[..33]));
    assert!(problem.contains("1 to 32"), "{problem}");
    let problem = only_problem(&format!(
        "boot = {{ kernel = \"{}\" }}",
        &long[..MAX_PATH + 1]
    ));
    assert!(
        problem.contains("1 to 180 bytes") && problem.len() < 200,
        "{problem}"
    );
}

#[test]
fn unknown_keys_are_errors_with_a_suggestion() {
    assert!(only_problem("vcpu = 1").ends_with("vm.vcpu: unknown key; did you mean vcpus?"));
    assert!(only_problem("memroy = 1").ends_with("did you mean memory?"));
    let problem = only_problem("colour = 1");
    assert!(
        problem.contains("allowed: name, vcpus, memory"),
        "{problem}"
    );
    let problem = only_problem("boot = { kernel = \"k\", cmd-line = \"\" }");
    assert!(
        problem.contains("vm.boot.cmd-line: unknown key; did you mean cmdline?"),
        "{problem}"
    );
    let all = problems(&format!("{GOOD}\n[hosts]\n"));
    assert_eq!(
        all,
        ["plinth.toml:24:2: error: hosts: unknown key; did you mean host?"]
    );
    let endless = format!("{} = 1", "k".repeat(5000));
    assert!(only_problem(&endless).len() < 400);
}

#[test]
fn bad_host_values_leave_the_default_and_the_vms() {
    let text = GOOD
        .replace("\"reset\"", "\"explode\"")
        .replace("ctrl-a", "ctrl-m")
        .replace("\"debug\"", "3");
    let config = parse("plinth.toml", text.as_bytes());
    assert_eq!(config.vms.len(), 2);
    assert_eq!(config.host.on_fault, OnFault::Halt);
    assert_eq!(config.host.console_escape, DEFAULT_ESCAPE);
    let all = problems(&text);
    assert_eq!(all.len(), 3);
    assert_eq!(
        all[0],
        "plinth.toml:2:12: error: host.on-fault: \"explode\" is unknown; allowed: \"halt\", \"reset\""
    );
    assert!(all[1].contains("host.log-level: must be a string"));
    assert!(all[2].contains("host.console-escape: \"ctrl-m\" is not a key"));
}

#[test]
fn escape_keys_are_control_characters() {
    for (text, byte) in [
        ("ctrl-z", 26),
        ("ctrl-]", 0x1d),
        ("ctrl-\\\\", 0x1c),
        ("ctrl-_", 0x1f),
    ] {
        let text = format!("[host]\nconsole-escape = \"{text}\"\n{}", with("vcpus = 1"));
        let config = parse("p", text.as_bytes());
        assert_eq!(
            (config.problems.len(), config.host.console_escape),
            (0, byte)
        );
    }
}

#[test]
fn duplicate_names_disable_the_second() {
    let text = GOOD.replace("stub-2", "linux");
    let all = problems(&text);
    assert_eq!(
        all,
        [
            "plinth.toml:17:8: error: VM #2: vm.name: \"linux\" is the name of the VM at line 9 already"
        ]
    );
    assert_eq!(parse("p", text.as_bytes()).vms.len(), 1);
}

#[test]
fn modules_are_paths_with_arguments() {
    let with = |value: &str| {
        let boot = format!("boot = {{ kernel = \"vmlinuz\", modules = {value} }}");
        parse("p", with(&boot).as_bytes())
    };
    let config = with(r#"["a b=c d", "e"]"#);
    let boot = &config.vms[0].boot;
    let texts: Vec<_> = boot.modules.iter().map(|m| (m.path(), &*m.text)).collect();
    assert_eq!(texts, [("a", "a b=c d"), ("e", "e")]);
    assert_eq!(boot.paths().collect::<Vec<_>>(), ["vmlinuz", "a", "e"]);
    let many = format!("[{}]", "\"m\", ".repeat(MAX_MODULES + 1));
    for (value, complaint) in [
        (r#""a""#, "must be a list of strings; found a string"),
        ("[1]", "must be a list of strings; found a whole number"),
        (r#"[""]"#, "\"\" is not a file's path"),
        (r#"["a\nb"]"#, "\"a\\nb\" is not a file's path"),
        (&many, "has 33 files; allowed: up to 32"),
    ] {
        let report = with(value).report();
        let complaint = format!("vm.boot.modules: {complaint}");
        assert!(report.contains(complaint.trim()), "{report}");
    }
    let mut place = place();
    let checked = |place: &Place| {
        let mut config = with(r#"["a x"]"#);
        check(&mut config, place);
        config
    };
    let problem = checked(&place).problems[0].to_string();
    assert!(
        problem.contains("vm.boot.modules: a: no such file"),
        "{problem}"
    );
    let large = FileFacts {
        bytes: 9 << 20,
        kind: FileKind::Other,
    };
    place.files.insert("a", large);
    let problem = checked(&place).problems[0].to_string();
    assert!(problem.contains("and the modules (9 MiB)"), "{problem}");
}

#[test]
fn a_console_frame_has_a_word_that_is_hard_to_guess() {
    let with = |word: &str| {
        let text = GOOD.replace("figures = true", &format!("console-frame = \"{word}\""));
        parse("p", text.as_bytes())
    };
    let word = "0123456789abcdef";
    assert_eq!(with(word).host.console_frame.as_deref(), Some(word));
    for bad in ["short", "with a blank in it", &word.repeat(5)] {
        let config = with(bad);
        assert_eq!(config.host.console_frame, None);
        assert!(
            config
                .report()
                .contains("allowed: 16 to 64 letters and digits")
        );
    }
}

#[test]
fn test_devices_are_there_on_demand_only() {
    let with = |value: &str| {
        let text = GOOD.replace(
            "focus = true",
            &format!("focus = true\ntest-devices = {value}"),
        );
        parse("p", text.as_bytes())
    };
    let config = with("true");
    let devices: Vec<_> = config.vms.iter().map(|vm| vm.test_devices).collect();
    assert_eq!(devices, [true, false]);
    let report = with("\"yes\"").report();
    assert!(
        report.contains("vm.test-devices: must be true or false"),
        "{report}"
    );
}

#[test]
fn firmware_is_looked_at() {
    let text = "[[vm]]\nname = \"pc\"\nmemory = \"64M\"\nboot = { firmware = \"code\", variables = \"vars\" }\n";
    let report = |files: &[(&'static str, u64, FileKind)]| {
        let mut config = parse("p", text.as_bytes());
        let files = files
            .iter()
            .map(|&(name, bytes, kind)| (name, FileFacts { bytes, kind }));
        let here = Place {
            files: files.collect(),
            ..place()
        };
        check(&mut config, &here);
        config.report()
    };
    let other = FileKind::Other;
    assert_eq!(
        report(&[("code", 0x37_c000, other), ("vars", 0x8_4000, other)]),
        "p: 1 VM can start\n"
    );
    for (code, vars, why) in [
        (
            0x37_c001,
            0x8_4000,
            "vm.boot.firmware: code: has 3653633 bytes; a firmware image has 64 KiB to 16 MiB, in steps of 4 KiB",
        ),
        (0xf000, 0x8_4000, "vm.boot.firmware: code: has 61440 bytes"),
        (
            0x100_1000,
            0x8_4000,
            "vm.boot.firmware: code: has 16781312 bytes",
        ),
        (
            0xf0_0000,
            0x10_1000,
            "vm.boot.variables: vars: has 1052672 bytes; a variable store has up to 1 MiB, in steps of 4 KiB",
        ),
        (0x4_0000, 0, "vm.boot.variables: vars: has 0 bytes"),
    ] {
        let report = report(&[("code", code, other), ("vars", vars, other)]);
        assert!(report.contains(why), "{report}");
    }
    let with_rom = text.replace("variables", "vga-rom");
    let mut config = parse("p", with_rom.as_bytes());
    check(&mut config, &place());
    let rom = config.report();
    assert!(rom.contains("vm.boot.vga-rom: vars: "), "{rom}");
    let text = text.replace("variables = \"vars\"", "kernel = \"code\"");
    let mut config = parse("p", text.as_bytes());
    let facts = FileFacts {
        bytes: 0x4_0000,
        kind: FileKind::Elf,
    };
    let here = Place {
        files: [("code", facts)].into(),
        ..place()
    };
    check(&mut config, &here);
    let report = config.report();
    assert!(
        report.contains("vm.boot.kernel: code: is not a bzImage, and firmware loads no other"),
        "{report}"
    );
}

#[test]
fn one_vm_has_the_focus() {
    let text = GOOD.replace("console = false", "focus = true");
    let config = parse("p", text.as_bytes());
    assert!(!config.has_errors());
    assert_eq!(config.problems[0].severity, Severity::Warning);
    let focus: Vec<_> = config.vms.iter().map(|vm| vm.focus).collect();
    assert_eq!(focus, [true, false]);
}

#[test]
fn broken_files_give_one_error_with_its_place() {
    let broken = [
        (GOOD.replace("vcpus = 2", "vcpus = "), "plinth.toml:10:"),
        (
            GOOD.replace("[[vm]]\nname = \"stub", "[[vm]\nname = \"stub"),
            "plinth.toml:16:",
        ),
        (
            GOOD.replace("vcpus = 2", "vcpus = 2\nvcpus = 2"),
            "plinth.toml:11:",
        ),
        ("\u{fffd}".to_owned(), "plinth.toml:1:2:"),
    ];
    for (text, place) in broken {
        let config = parse("plinth.toml", text.as_bytes());
        assert_eq!((config.vms.len(), config.problems.len()), (0, 1));
        let problem = config.problems[0].to_string();
        assert!(
            problem.starts_with(place) && !problem.contains('\n'),
            "{problem}"
        );
    }
    let config = parse("p", b"a = 1\n# \xff\n");
    assert_eq!(
        config.problems[0].to_string(),
        "p:2:3: error: the file is not UTF-8 text from here on"
    );
    let config = parse("p", &vec![b'#'; MAX_FILE_BYTES + 1]);
    assert_eq!(
        config.problems[0].to_string(),
        "p: error: the file has 65537 bytes; allowed: up to 65536"
    );
}

#[test]
fn a_file_without_vms_says_what_to_do() {
    for text in ["", "[host]\n", "vm = []\n"] {
        let all = problems(text);
        assert_eq!(all.len(), 1);
        assert!(
            all[0].contains("no VM is defined; add a [[vm]] section"),
            "{}",
            all[0]
        );
    }
    assert!(problems("[vm]\nname = \"a\"\n")[0].contains("must be [[vm]] sections; found a table"));
    assert!(problems("vm = [1]\n")[0].contains("VM #1: vm: must be a [[vm]] section"));
}

#[test]
fn vms_and_problems_are_limited() {
    let mut text = String::new();
    for i in 0..MAX_VMS + 10 {
        text += &with("vcpus = 1").replace("\"a\"", &format!("\"vm-{i}\""));
    }
    let config = parse("p", text.as_bytes());
    assert_eq!((config.vms.len(), config.problems.len()), (MAX_VMS, 1));
    assert!(
        config.problems[0]
            .to_string()
            .contains("there are 74 VMs; allowed: up to 64")
    );

    let nonsense: String = (0..1000).map(|i| format!("k{i} = 1\n")).collect();
    let config = parse("p", (nonsense + &with("vcpus = 1")).as_bytes());
    assert_eq!(
        (config.problems.len(), config.dropped),
        (MAX_PROBLEMS, 1000 - MAX_PROBLEMS)
    );
    assert!(config.has_errors() && config.report().contains("p: 936 further problems\n"));
}

struct Place {
    memory: Option<u64>,
    processors: Option<usize>,
    files: BTreeMap<&'static str, FileFacts>,
}

impl Environment for Place {
    fn memory_bytes(&self) -> Option<u64> {
        self.memory
    }
    fn processors(&self) -> Option<usize> {
        self.processors
    }
    fn file(&self, path: &str) -> Result<FileFacts, String> {
        self.files
            .get(path)
            .copied()
            .ok_or("no such file".to_owned())
    }
}

fn place() -> Place {
    let facts = |bytes, kind| FileFacts { bytes, kind };
    Place {
        memory: None,
        processors: None,
        files: [
            ("vmlinuz", facts(8 << 20, FileKind::BzImage)),
            ("initrd.img", facts(4 << 20, FileKind::Compressed("gzip"))),
            ("stub.elf", facts(9000, FileKind::Elf)),
        ]
        .into(),
    }
}

fn checked(place: &Place) -> Config {
    let mut config = parse("p", GOOD.as_bytes());
    check(&mut config, place);
    config
}

fn first_problem(place: &Place) -> String {
    checked(place).problems[0].to_string()
}

#[test]
fn what_is_there_passes() {
    let mut place = place();
    assert_eq!(checked(&place).problems, []);
    place.memory = Some((1 << 30) + (64 << 20));
    place.processors = Some(2);
    let config = checked(&place);
    assert_eq!((config.problems.len(), config.vms.len()), (0, 2));
}

#[test]
fn memory_beyond_the_hosts_disables_the_vm() {
    let mut place = place();
    place.memory = Some(900 << 20);
    let config = checked(&place);
    assert_eq!(config.vms.len(), 1);
    assert_eq!(config.vms[0].name, "stub-2");
    assert_eq!(
        config.problems[0].to_string(),
        "p:11:10: error: VM linux: vm.memory: 1 GiB is more than the host has for VMs; allowed: up to 900 MiB"
    );
    place.memory = Some((1 << 30) + (32 << 20));
    let config = checked(&place);
    assert_eq!(config.vms[0].name, "linux");
    assert_eq!(
        config.problems[0].to_string(),
        "p:18:10: error: VM stub-2: vm.memory: 64 MiB is more than the 32 MiB that the VMs before it leave \
         of the host's 1.0 GiB"
    );
}

#[test]
fn files_are_looked_at() {
    let mut place = place();
    place.files.remove("vmlinuz");
    let problem = first_problem(&place);
    assert_eq!(
        problem,
        "p:14:19: error: VM linux: vm.boot.kernel: vmlinuz: no such file"
    );
    let kinds = [
        (
            FileKind::Other,
            "vmlinuz: is not a bzImage, ELF or multiboot kernel",
        ),
        (FileKind::EfiApplication, "is an EFI application"),
        (
            FileKind::Compressed("xz"),
            "is compressed with xz; give it unpacked",
        ),
    ];
    for (kind, expected) in kinds {
        place
            .files
            .insert("vmlinuz", FileFacts { bytes: 100, kind });
        let problem = first_problem(&place);
        assert!(problem.contains(expected), "{problem}");
    }
    let empty = FileFacts {
        bytes: 0,
        kind: FileKind::Other,
    };
    place.files.insert("vmlinuz", empty);
    place.files.insert("initrd.img", empty);
    let config = checked(&place);
    let all: Vec<_> = config.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        all,
        [
            "p:14:19: error: VM linux: vm.boot.kernel: vmlinuz: is empty",
            "p:14:39: error: VM linux: vm.boot.initrd: initrd.img: is empty",
        ]
    );
    assert_eq!(config.disabled, ["linux"]);
}

#[test]
fn files_larger_than_the_memory_disable_the_vm() {
    let mut place = place();
    let facts = FileFacts {
        bytes: 1 << 30,
        kind: FileKind::BzImage,
    };
    place.files.insert("vmlinuz", facts);
    assert_eq!(
        first_problem(&place),
        "p:11:10: error: VM linux: vm.memory: 1 GiB is too little for the kernel (1 GiB) and the initrd (4 MiB)"
    );
}

#[test]
fn more_vcpus_than_processors_is_a_warning() {
    let mut place = place();
    place.processors = Some(1);
    let config = checked(&place);
    assert_eq!((config.vms.len(), config.has_errors()), (2, false));
    assert_eq!(
        config.problems[0].to_string(),
        "p:10:9: warning: VM linux: vm.vcpus: 2 virtual processors share 1 of the host"
    );
}

#[test]
fn kinds_are_recognized() {
    let mut image = vec![0; 1024];
    image[..2].copy_from_slice(b"MZ");
    assert_eq!(FileKind::sniff(&image), FileKind::EfiApplication);
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    assert_eq!(FileKind::sniff(&image), FileKind::BzImage);
    assert_eq!(FileKind::sniff(b"\x7fELF\x02\x01"), FileKind::Elf);
    assert_eq!(
        FileKind::sniff(b"\x1f\x8b\x08"),
        FileKind::Compressed("gzip")
    );
    assert_eq!(FileKind::sniff(b""), FileKind::Other);
    assert_eq!(FileKind::sniff(b"#!/bin/sh"), FileKind::Other);
    let flat = |sum: u32| {
        let mut image = vec![0x90; 8192];
        let words = [0x1bad_b002, 1 << 16, sum].map(u32::to_le_bytes);
        image[8180..].copy_from_slice(words.as_flattened());
        image
    };
    let sum = 0u32.wrapping_sub(0x1bad_b002 + (1 << 16));
    assert_eq!(FileKind::sniff(&flat(sum)), FileKind::Multiboot);
    assert_eq!(FileKind::sniff(&flat(sum + 1)), FileKind::Other);
}

proptest! {
    /// Whatever the text: no panic, and a VM is either usable or named as disabled.
    #[test]
    fn any_text_is_handled(
        edits in prop::collection::vec((0..GOOD.len(), any::<u8>(), 0..6usize), 0..6),
    ) {
        let mut text = GOOD.as_bytes().to_vec();
        for (at, byte, remove) in edits {
            let at = at.min(text.len());
            let end = (at + remove).min(text.len());
            text.splice(at..end, [byte % 128]);
        }
        let config = parse("p", &text);
        prop_assert!(config.vms.len() == 2 || config.has_errors());
        for vm in &config.vms {
            prop_assert!(!config.disabled.contains(&vm.name));
            prop_assert!((1..=MAX_VCPUS).contains(&vm.vcpus));
            prop_assert!((MIN_MEMORY..=MAX_MEMORY).contains(&vm.memory));
        }
        for problem in &config.problems {
            prop_assert!(!problem.to_string().contains(char::is_control), "{}", problem);
        }
    }

    #[test]
    fn any_bytes_are_handled(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(parse("p", &bytes).has_errors());
    }

    #[test]
    fn sizes_are_read(number in 0..1u64 << 40, unit in 0..3usize) {
        let (letter, shift) = [("M", 20), ("g", 30), ("T", 40)][unit];
        let bytes = u128::from(number) << shift;
        prop_assert_eq!(
            memory_size(&format!("{number}{letter}")),
            Some(u64::try_from(bytes).unwrap_or(u64::MAX))
        );
    }
}

const DISKS: &str = r#"disks = [{ image = "a.img" }, { image = "b.iso", readonly = true }, { image = "c", changes = "8M" }]"#;

#[test]
fn disks_are_read_in_order() {
    let config = parse("p", with(DISKS).as_bytes());
    assert_eq!(config.problems, []);
    let disks: Vec<_> = config.vms[0]
        .disks
        .iter()
        .map(|d| (d.image.as_str(), d.readonly, d.changes))
        .collect();
    let wanted = [
        ("a.img", false, DEFAULT_CHANGES),
        ("b.iso", true, 0),
        ("c", false, 8 << 20),
    ];
    assert_eq!(disks, wanted);
}

#[test]
fn bad_disks_disable_the_vm() {
    let many = format!("disks = [{}]", "{ image = \"d\" }, ".repeat(9));
    for (line, wanted) in [
        (
            "disks = 7",
            "vm.disks: must be a list of tables; found a whole number",
        ),
        (
            "disks = [\"a.img\"]",
            "vm.disks: must be a list of tables; found a string",
        ),
        (&many, "vm.disks: there are 9 disks; allowed: up to 8"),
        ("disks = [{}]", "vm.disks.image: missing"),
        (
            "disks = [{ image = \"\" }]",
            "vm.disks.image: \"\" is not a file's path",
        ),
        (
            "disks = [{ image = \"d\", read-only = true }]",
            "vm.disks.read-only: unknown key; did you mean readonly?",
        ),
        (
            "disks = [{ image = \"d\", readonly = true, changes = \"8M\" }]",
            "vm.disks.changes: a read-only disk has none",
        ),
        (
            "disks = [{ image = \"d\", changes = 0 }]",
            "vm.disks.changes: 0 is too little; allowed: 1 MiB to 1 TiB",
        ),
    ] {
        let problem = only_problem(line);
        assert!(problem.contains(wanted), "{line}: {problem}");
        assert!(parse("p", with(line).as_bytes()).vms.is_empty());
    }
}

#[test]
fn disks_are_compared_with_what_is_there() {
    let mut place = place();
    let facts = |bytes| FileFacts {
        bytes,
        kind: FileKind::Other,
    };
    place.files.extend([
        ("k", place.files["stub.elf"]),
        ("a.img", facts(4 << 20)),
        ("b.iso", facts(1 << 30)),
    ]);
    let mut config = parse("p", with(DISKS).as_bytes());
    check(&mut config, &place);
    let line = config.problems[0].to_string();
    assert_eq!(line, "p:5:79: error: VM a: vm.disks.image: c: no such file");
    place.files.insert("c", facts(1 << 30));
    let mut config = parse("p", with(DISKS).as_bytes());
    // Two blocks in 1024 are for tables.
    let needed = (16 << 20) + (4 << 20) + 2 * 4096 + (8 << 20);
    place.memory = Some(needed);
    check(&mut config, &place);
    assert_eq!(config.problems, []);
    assert_eq!(config.vms[0].disks[0].changes, (4 << 20) + 2 * 4096);
    place.memory = Some(needed - 1);
    check(&mut config, &place);
    let line = config.problems[0].to_string();
    assert!(
        line.contains(
            "vm.memory: 16 MiB and 12.0 MiB for changes on its disks is more than the host has"
        ),
        "{line}"
    );
}
