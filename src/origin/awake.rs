//! Waits that are not over because this process slept.
//!
//! After a SIGSTOP, a frozen cgroup or a suspended machine every timer fires at once, before what arrived meanwhile is
//! read from its socket. A wait that ends far too late therefore gets its time once more; never more than once, so that
//! every wait ends on the slowest of machines too.

use std::time::Duration;

use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep_until, timeout_at};

/// A timer that is so late was not served because nothing was. A busy machine is seldom as late, and there the longer
/// wait is right as well.
const LATE: Duration = Duration::from_millis(100);

/// What `future` becomes within `limit`.
///
/// # Errors
/// When it does not.
pub async fn timeout<F: Future>(limit: Duration, future: F) -> Result<F::Output, Elapsed> {
    tokio::pin!(future);
    let due = Instant::now() + limit;
    match timeout_at(due, &mut future).await {
        Err(_) if due.elapsed() > LATE => timeout_at(Instant::now() + limit, future).await,
        outcome => outcome,
    }
}

/// Ends after `limit`.
pub async fn sleep(limit: Duration) {
    let due = Instant::now() + limit;
    sleep_until(due).await;
    if due.elapsed() > LATE {
        sleep_until(Instant::now() + limit).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than a timer may be late, and than any limit here.
    const STOPPED: Duration = Duration::from_millis(400);

    /// A process that is stopped while its future, which needs `after` of running time, is under way.
    async fn stopped_for(after: Duration) -> Result<(), Elapsed> {
        let work = async {
            // All of this runtime's threads, which are one.
            std::thread::sleep(STOPPED);
            tokio::time::sleep(after).await;
        };
        tokio::task::yield_now().await;
        timeout(Duration::from_millis(200), work).await
    }

    #[tokio::test]
    async fn a_sleep_does_not_count_and_the_wait_ends() {
        assert!(stopped_for(Duration::from_millis(20)).await.is_ok());
        assert!(stopped_for(Duration::from_secs(3_600)).await.is_err());
        assert!(timeout(Duration::from_millis(10), std::future::pending::<()>()).await.is_err());
    }
}
