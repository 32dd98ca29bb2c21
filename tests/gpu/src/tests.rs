//! That what a card keeps to itself is seen here.

use std::collections::HashMap;

use super::{
    block::{self, Launch},
    graph::State,
    host::Host,
    ptx::Module,
};

/// A kernel of these instructions, with the address of a piece of memory in `%rd0`, the number of the thread in `%r0`, twice as many bytes of
/// it in `%rd1`, and 256 bytes of shared memory.
fn kernel(instructions: &str) -> String {
    format!(
        ".version 9.0 .target sm_90 .address_size 64
        .visible .entry k(.param .u64 k_0) {{
            .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>;
            .shared .align 16 .b8 s[256];
            ld.param.u64 %rd0, [k_0];
            mov.u32 %r0, %tid.x;
            mul.wide.u32 %rd1, %r0, 2;
            {instructions}
            ret;
        }}"
    )
}

/// Runs `instructions` by so many threads over `bytes` of memory; gives the memory, or what was wrong.
fn run(state: &mut State, at: u64, instructions: &str, threads: u32, is_early: bool) -> Result<(), String> {
    let kernel = Module::new(&kernel(instructions)).kernel("k", &HashMap::new())?.ok_or("no kernel")?;
    let launch = Launch {
        kernel: &kernel,
        blocks: [1, 1, 1],
        threads: [threads, 1, 1],
        dynamic_shared: 0,
        params: &at.to_le_bytes(),
        is_early,
    };
    block::run(&launch, state)
}

/// The same on its own, over 128 bytes.
fn on_its_own(instructions: &str, threads: u32) -> Result<Vec<u16>, String> {
    let mut state = State::default();
    let at = state.memory.allocate(128);
    run(&mut state, at, instructions, threads, false)?;
    // SAFETY: the piece has 64 of them.
    Ok((0..64).map(|i| unsafe { (at as *const u16).add(i).read() }).collect())
}

fn fails_with(instructions: &str, threads: u32, expected: &str) {
    let why = on_its_own(instructions, threads).unwrap_err();
    assert!(why.contains(expected), "{why}");
}

#[test]
fn threads_compute_and_lanes_that_parted_meet_again() {
    let squares = "
        add.u64 %rd2, %rd0, %rd1;
        mul.lo.u32 %r1, %r0, %r0;
        and.b32 %r2, %r0, 1;
        setp.eq.u32 %p0, %r2, 0;
        @%p0 bra EVEN;
        add.u32 %r1, %r1, 1000;
        EVEN:
        shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;
        cvt.u16.u32 %rs0, %r1;
        st.global.u16 [%rd2], %rs0;";
    let expected: Vec<u16> =
        (0..64).map(|i: u16| (i ^ 1) * (i ^ 1) + if i.is_multiple_of(2) { 1000 } else { 0 }).collect();
    assert_eq!(on_its_own(squares, 64).unwrap(), expected);
}

#[test]
fn memory_that_is_not_written_holds_no_number() {
    assert!(on_its_own("", 1).unwrap().iter().all(|&bits| half::f16::from_bits(bits).is_nan()));
}

#[test]
fn an_access_outside_or_without_alignment_is_an_error() {
    let store = "add.u64 %rd2, %rd0, %rd1; mov.u16 %rs0, 0; st.global.u16 [%rd2], %rs0;";
    on_its_own(store, 64).unwrap();
    fails_with(store, 65, "2 bytes at");
    fails_with("add.u64 %rd2, %rd0, %rd1; ld.global.u32 %r1, [%rd2];", 2, "not aligned");
    fails_with("ld.shared.u32 %r1, [s+256];", 1, "of 256 shared ones");
}

#[test]
fn two_warps_at_one_byte_need_a_barrier_between() {
    let exchange = |barrier: &str| {
        format!(
            "mov.u32 %r1, s; shl.b32 %r2, %r0, 1; add.u32 %r3, %r1, %r2; mov.u16 %rs0, 7;
            st.shared.u16 [%r3], %rs0; {barrier} ld.shared.u16 %rs1, [s+2];"
        )
    };
    on_its_own(&exchange("bar.sync 0;"), 64).unwrap();
    fails_with(&exchange(""), 64, "are both at shared byte 2");
    on_its_own(&exchange(""), 32).unwrap();
}

#[test]
fn what_is_added_to_is_read_after_a_barrier() {
    let add = |barrier: &str| {
        format!(
            "setp.eq.u32 %p0, %r0, 0; mov.u32 %r1, 0; @%p0 st.shared.u32 [s], %r1; bar.sync 0;
            atom.shared.add.u32 %r2, [s], 1; {barrier} ld.shared.u32 %r3, [s];
            add.u64 %rd2, %rd0, %rd1; cvt.u16.u32 %rs0, %r3; st.global.u16 [%rd2], %rs0;"
        )
    };
    assert_eq!(on_its_own(&add("bar.sync 0;"), 64).unwrap(), [64; 64]);
    fails_with(&add(""), 64, "are both at shared byte 0");
}

#[test]
fn lanes_that_part_before_they_work_together_are_an_error() {
    let part = "setp.lt.u32 %p0, %r0, 7; @%p0 ret;";
    fails_with(&format!("{part} shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;"), 32, "which is not there");
    fails_with("setp.lt.u32 %p0, %r0, 7; @%p0 bar.sync 0;", 32, "not all lanes");
    let half = "setp.lt.u32 %p0, %r0, 16; @%p0 shfl.sync.bfly.b32 %r1, %r0, 1, 31,";
    on_its_own(&format!("{half} 0xffff;"), 32).unwrap();
    fails_with(&format!("{half} -1;"), 32, "only lanes 0xffff reach");
}

#[test]
fn what_a_copy_brings_is_there_when_it_was_waited_for() {
    let copy = |wait: &str| {
        format!(
            "mov.u32 %r1, s; mov.u16 %rs0, 5; add.u64 %rd2, %rd0, %rd1; st.global.u16 [%rd2], %rs0;
            cp.async.cg.shared.global [%r1], [%rd0], 16, 16; cp.async.commit_group; {wait}
            ld.shared.u16 %rs1, [%r1]; st.global.u16 [%rd2], %rs1;"
        )
    };
    assert_eq!(on_its_own(&copy("cp.async.wait_group 0;"), 1).unwrap()[0], 5);
    assert_eq!(on_its_own(&copy("cp.async.wait_group 1;"), 1).unwrap()[0], u16::MAX);
}

#[test]
fn a_kernel_that_begins_early_waits_before_it_looks_at_what_is_being_written() {
    let mut state = State::default();
    let (one, other) = (state.memory.allocate(128), state.memory.allocate(128));
    let lets_begin = "mov.u16 %rs0, 5; griddepcontrol.launch_dependents; st.global.u16 [%rd0], %rs0;";
    let (load, wait) = ("ld.global.u16 %rs1, [%rd0];", "griddepcontrol.wait;");
    let mut after = |at: u64, instructions: &str, is_early: bool| {
        run(&mut state, one, lets_begin, 1, false)?;
        run(&mut state, at, instructions, 1, is_early)
    };
    after(one, &format!("{wait} {load}"), true).unwrap();
    after(other, &format!("{load} {wait}"), true).unwrap();
    after(one, load, false).unwrap();
    assert!(after(one, "", true).unwrap_err().contains("does not wait"));
    assert!(after(one, &format!("{load} {wait}"), true).unwrap_err().contains("before the kernel waited"));
}

#[test]
fn what_is_copied_to_the_host_is_there_once_it_was_waited_for() {
    let mut host = Host::default();
    let at = host.allocate(16);
    let read = || unsafe { (at as *const u32).read() };
    assert!(host.has(at + 4, 12) && !host.has(at + 4, 16) && !host.has(at - 1, 1));
    host.begin(1, at, 7u32.to_le_bytes().into());
    host.record(5, 1);
    assert_eq!(read(), u32::MAX);
    assert!(!host.free(at), "the device writes there");
    // Neither another stream nor an event from before has anything to do with it.
    host.await_stream(2);
    host.await_event(6);
    assert_eq!(read(), u32::MAX);
    host.await_event(5);
    assert_eq!(read(), 7);
    host.begin(1, at, 8u32.to_le_bytes().into());
    host.await_event(5);
    assert_eq!(read(), u32::MAX);
    host.await_stream(1);
    assert_eq!(read(), 8);
    assert!(host.free(at) && !host.free(at));
}
