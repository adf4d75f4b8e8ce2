//! One end-to-end scenario: its name, what it needs of the machine, its limit of time, what it does.

use std::sync::{LazyLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use berth_e2e::kernel::KernelHost;
use berth_e2e::ours::{NODE, OPERATOR, Ours, TEST_HTTP, TEST_S3};
use berth_e2e::site::Site;
use berth_e2e::tools::Tool;
use futures::FutureExt as _;
use futures::future::LocalBoxFuture;
use libtest_mimic::{Completion, Failed, Trial};
use tokio::runtime::Runtime;

/// The runtime of all scenarios: clients keep a task on the runtime that made them.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("the runtime starts"));

/// How long a scenario may run, unless it says otherwise. Building missing programs does not count.
const LIMIT: Duration = Duration::from_secs(240);

/// Held by a scenario while it runs: shared by those that run beside each other, alone by all others.
static MACHINE: RwLock<()> = RwLock::new(());

/// What a scenario needs of the machine; without it the scenario is skipped.
#[derive(Debug, Clone, Copy)]
pub enum Need {
    /// A program that the suite finds or builds.
    Tool(Tool),
    /// A command on `PATH`.
    Command(&'static str),
    /// `BERTH_E2E_LONG=1`, which `make e2e` sets.
    Long,
    /// A program of ours, built if it is not up to date.
    Program(Ours),
    /// A machine that can run a whole site.
    Site,
    /// A machine that can run hosts with a kernel of their own.
    Kernel,
    /// A memory controller that limits a process.
    MemoryCgroup,
}

/// etcd and kube-apiserver.
pub const CONTROL_PLANE: &[Need] = &[Need::Tool(Tool::Etcd), Need::Tool(Tool::KubeApiserver)];

/// Why a scenario does not run.
enum Obstacle {
    Missing(String),
    Broken(String),
}

impl Need {
    /// A whole site with the test S3 server.
    pub const SITE: &[Self] = &[
        Self::Site,
        Self::Tool(Tool::Etcd),
        Self::Tool(Tool::KubeApiserver),
        Self::Command("curl"),
        Self::Command("losetup"),
        Self::Command("nsenter"),
        Self::Program(OPERATOR),
        Self::Program(NODE),
        Self::Program(TEST_S3),
        Self::Program(TEST_HTTP),
    ];

    fn meet(self) -> Result<(), Obstacle> {
        match self {
            Self::Tool(tool) => match tool.obtain() {
                Ok(_) => Ok(()),
                Err(error) if error.is_missing_prerequisite() => Err(Obstacle::Missing(error.to_string())),
                Err(error) => Err(Obstacle::Broken(format!("{:#}", anyhow::Error::from(error)))),
            },
            Self::Program(program) => match program.obtain() {
                Ok(_) => Ok(()),
                Err(error) => Err(Obstacle::Broken(format!("{:#}", anyhow::Error::from(error)))),
            },
            Self::MemoryCgroup => {
                crate::memory::obstacle().map_or(Ok(()), |reason| Err(Obstacle::Missing(reason)))
            }
            Self::Kernel => KernelHost::obstacle().map_or(Ok(()), |reason| Err(Obstacle::Missing(reason))),
            Self::Site => Site::obstacle().map_or(Ok(()), |reason| Err(Obstacle::Missing(reason))),
            Self::Long => crate::safety::long().then_some(()).ok_or_else(|| {
                Obstacle::Missing("takes minutes and is not part of every run: `make e2e` runs it".to_owned())
            }),
            Self::Command(name) => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                let mut dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
                let found = dirs.any(|dir| dir.join(name).is_file());
                found.then_some(()).ok_or_else(|| Obstacle::Missing(format!("{name} is not on PATH")))
            }
        }
    }
}

type Body = Box<dyn FnOnce() -> LocalBoxFuture<'static, anyhow::Result<()>> + Send>;

/// One scenario of the suite.
pub struct Scenario {
    name: &'static str,
    needs: Vec<Need>,
    limit: Duration,
    beside: bool,
    body: Body,
}

impl Scenario {
    /// A scenario called `file::what_it_shows`; `body` fails by error or by panic.
    pub fn new<F, Fut>(name: &'static str, needs: &[Need], body: F) -> Self
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = anyhow::Result<()>> + 'static,
    {
        Self {
            name,
            needs: needs.to_vec(),
            limit: LIMIT,
            beside: false,
            body: Box::new(|| body().boxed_local()),
        }
    }

    /// The same, with another limit of time.
    #[must_use]
    pub fn limited(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The same, run while others of this kind run: it has a control plane of its own, mostly waits, and looks at nothing else
    /// of the machine.
    #[must_use]
    pub fn beside(mut self) -> Self {
        self.beside = true;
        self
    }

    /// Turns it into a trial of the test runner.
    pub fn into_trial(self) -> Trial {
        let Self { name, needs, limit, beside, body } = self;
        Trial::ignorable_test(name, move || {
            let _shared = beside.then(|| MACHINE.read().unwrap_or_else(PoisonError::into_inner));
            let _alone = (!beside).then(|| MACHINE.write().unwrap_or_else(PoisonError::into_inner));
            for need in needs {
                match need.meet() {
                    Ok(()) => {}
                    Err(Obstacle::Missing(reason)) => {
                        return Ok(Completion::ignored_with(format!("SKIPPED {name}: {reason}")));
                    }
                    Err(Obstacle::Broken(reason)) => return Err(Failed::from(reason)),
                }
            }
            let begun = Instant::now();
            let outcome = RUNTIME.block_on(async { tokio::time::timeout(limit, body()).await });
            println!("scenario {name} took {} s", begun.elapsed().as_secs());
            match outcome {
                Ok(Ok(())) => Ok(Completion::Completed),
                Ok(Err(error)) => Err(Failed::from(format!("{error:#}"))),
                Err(_) => Err(Failed::from(format!("not finished after {limit:?}"))),
            }
        })
    }
}
