//! Daemons killed (SIGKILL) and stopped (SIGSTOP), and the VDIs of one that is dead, asleep or cut off taken over.

use anyhow::Result;

use crate::host::{Host, Signal};
use crate::hurt_links::cut_off;
use crate::network::HOSTS;
use crate::table::{PAIRS, WAYS};
use crate::world::World;

pub fn kill_one(world: &mut World, host: usize) -> Result<()> {
    world.hosts[host].kill()
}

pub fn kill_two(world: &mut World, pair: usize) -> Result<()> {
    world.hosts[PAIRS[pair].0].kill()?;
    world.hosts[PAIRS[pair].1].kill()
}

pub fn kill_all(world: &mut World, _: usize) -> Result<()> {
    world.hosts.iter_mut().try_for_each(Host::kill)
}

pub fn start_all(world: &mut World, _: usize) -> Result<()> {
    let dead: Vec<usize> = (0..HOSTS)
        .filter(|host| !world.hosts[*host].is_up() && !world.hosts[*host].is_stopped())
        .collect();
    world.start_hosts(&dead)
}

/// Until its lease has ended, as the others see it.
fn until_given_up(world: &mut World, hosts: &[usize]) -> Result<()> {
    world.until("the others give it up", |world| {
        let others = (0..HOSTS).filter(|host| world.hosts[*host].is_up() && !hosts.contains(host));
        for other in others {
            let seen = world.hosts[other].get("/v1/hosts")?;
            let given_up = |name: String| {
                let mut hosts = seen.as_array().into_iter().flatten();
                hosts.any(|host| host["name"] == name && host["is_alive"] == false)
            };
            if !hosts.iter().all(|host| given_up(world.hosts[*host].name())) {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

pub fn stop_one(world: &mut World, host: usize) -> Result<()> {
    world.hosts[host].signal(Signal::Stop)?;
    until_given_up(world, &[host])
}

pub fn stop_two(world: &mut World, pair: usize) -> Result<()> {
    let (one, other) = PAIRS[pair];
    world.hosts[one].signal(Signal::Stop)?;
    world.hosts[other].signal(Signal::Stop)?;
    until_given_up(world, &[one, other])
}

pub fn kill_one_stop_another(world: &mut World, way: usize) -> Result<()> {
    let (one, other) = WAYS[way];
    world.hosts[one].kill()?;
    world.hosts[other].signal(Signal::Stop)?;
    until_given_up(world, &[one, other])
}

pub fn continue_all(world: &mut World, _: usize) -> Result<()> {
    for host in world.hosts.iter_mut().filter(|host| host.is_stopped()) {
        host.signal(Signal::Continue)?;
    }
    Ok(())
}

// A VDI changes hands while its old writer is dead, asleep, or alive behind a cut. Variants are VDIs.

fn take_over_by_next(world: &mut World, number: usize) -> Result<()> {
    let old = world.vdis[number].placed.writer;
    world.take_over(number, (old + 1) % HOSTS)
}

pub fn kill_writer_and_take_over(world: &mut World, number: usize) -> Result<()> {
    let writer = world.vdis[number].placed.writer;
    world.hosts[writer].kill()?;
    take_over_by_next(world, number)
}

pub fn stop_writer_and_take_over(world: &mut World, number: usize) -> Result<()> {
    let writer = world.vdis[number].placed.writer;
    world.hosts[writer].signal(Signal::Stop)?;
    take_over_by_next(world, number)
}

pub fn cut_off_writer_and_take_over(world: &mut World, number: usize) -> Result<()> {
    cut_off(world, world.vdis[number].placed.writer)?;
    take_over_by_next(world, number)
}

/// The host of the guest in QEMU dies, and the guest with it.
pub fn kill_with_debian(world: &mut World, _: usize) -> Result<()> {
    world.kill_debian_with_its_host()
}

/// The old writer's guest, which was never told that it should go, is hung up on and comes to the new one.
fn old_guests_move(world: &mut World, number: usize) -> Result<()> {
    world.until("the old writer hangs up on its guest", |world| {
        Ok(world.vdis[number].loads[0].connections() > world.vdis[number].connections_before)
    })
}

pub fn continue_old_writer(world: &mut World, number: usize) -> Result<()> {
    continue_all(world, 0)?;
    old_guests_move(world, number)
}

pub fn reach_old_writer(world: &mut World, number: usize) -> Result<()> {
    world.network.mend()?;
    old_guests_move(world, number)
}

pub fn start_and_continue_all(world: &mut World, _: usize) -> Result<()> {
    continue_all(world, 0)?;
    start_all(world, 0)
}
