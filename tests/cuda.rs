//! What only a CUDA device has: errors of a missing one, streams, graphs, memory of other libraries. The operations
//! themselves are tested with all other devices' in the other files.
#![cfg(feature = "cuda")]

mod common;

use common::cases::{Case, Outcome, Place, Problem, Tables};
use common::{Elements, cuda};
use ferroflash::op::attention::AttentionPlan;
use ferroflash::{AttentionSpec, Batch, DType, Device, Error, NaturalLog, PlanLimits, Splits, Tensor, View};

#[test]
fn a_machine_without_a_gpu_says_so() {
    match Device::cuda(0) {
        Ok(device) => println!("found {}", device.description()),
        Err(Error::Unavailable { device, why }) => {
            println!("{device}: {why}");
            assert_eq!(Device::auto().id(), ferroflash::DeviceId::Cpu);
        }
        Err(other) => panic!("not the error of a missing device: {other}"),
    }
    // No machine has so many.
    assert!(matches!(Device::cuda(4096), Err(Error::Unavailable { .. })));
}

fn problem() -> Problem {
    Problem::new(Case {
        spec: AttentionSpec::new(8, 2, 128).causal(),
        lengths: vec![(1, 900), (40, 333)],
        n_tree: None,
        q_dtype: DType::F16,
        kv_dtype: DType::F16,
        place: Place::Paged { page_size: 16, nhd: false, block_table: false },
        splits: Splits::Fixed(256),
        lists: None,
        q_scale: 1.0,
        seed: 5,
    })
}

#[test]
fn a_captured_run_replays_with_new_queries() {
    let Some(device) = cuda() else { return };
    let problem = problem();
    let shape = [41, 8, 128];
    let tables = Tables::new(&problem, &device);
    let batch = Batch::new(&problem.qo_indptr, tables.kv_table());
    let mut plan = AttentionPlan::new(&device, &problem.case.spec, &batch, problem.case.splits).unwrap();
    let q = Elements::new(DType::F16, &problem.q).tensor(&device, &shape);
    let mut out = Tensor::zeros(&device, DType::F16, &shape).unwrap();
    plan.run(q.view(), tables.kv(), out.view_mut(), None).unwrap();
    let expected = Elements::of_tensor(&out).to_f32();
    let graph = device.capture(|| plan.run(q.view(), tables.kv(), out.view_mut(), None)).unwrap();
    drop(out);
    let mut out = Tensor::zeros(&device, DType::F16, &shape).unwrap();
    let graph_again = device.capture(|| plan.run(q.view(), tables.kv(), out.view_mut(), None)).unwrap();
    drop(graph);
    for _ in 0..3 {
        // SAFETY: the plan and all tensors of the second graph are alive.
        unsafe { graph_again.replay() }.unwrap();
    }
    assert_eq!(Elements::of_tensor(&out).to_f32(), expected);
}

/// One graph, replayed after each update of the plan that it was recorded of.
#[test]
fn a_captured_run_replays_with_other_lengths() {
    let Some(device) = cuda() else { return };
    let limits = PlanLimits { sequences: 8, q_tokens: 8, page_size: 16, pages: 400, tree_words: 0 };
    let base = Case { splits: Splits::Auto, ..problem().case };
    let (spec, shape) = (base.spec.clone(), [8, 8, 128]);
    let mut plan = AttentionPlan::with_limits(&device, &spec, limits, Splits::Auto).unwrap();
    let lengths =
        [vec![(1, 3000), (1, 17), (1, 900)], vec![(2, 40)], vec![(1, 2999), (1, 20), (1, 5), (3, 800)]];
    for lengths in lengths {
        let problem = Problem::new(Case { lengths, ..base.clone() });
        let tables = Tables::new(&problem, &device);
        let mut q = problem.q.clone();
        q.resize(shape.iter().product(), 0.0);
        let q = Elements::new(DType::F16, &q).tensor(&device, &shape);
        let mut out = Tensor::zeros(&device, DType::F16, &shape).unwrap();
        let mut lse = Tensor::zeros(&device, DType::F32, &shape[..2]).unwrap();
        // Recorded while the plan has no batch.
        plan.update(&Batch::new(
            &[0],
            Tables::new(&Problem::new(Case { lengths: vec![], ..base.clone() }), &device).kv_table(),
        ))
        .unwrap();
        plan.run(q.view(), tables.kv(), out.view_mut(), Some(NaturalLog(lse.view_mut()))).unwrap();
        let graph = device
            .capture(|| plan.run(q.view(), tables.kv(), out.view_mut(), Some(NaturalLog(lse.view_mut()))))
            .unwrap();
        plan.update(&Batch::new(&problem.qo_indptr, tables.kv_table())).unwrap();
        // SAFETY: the plan and all tensors are alive.
        unsafe { graph.replay() }.unwrap();
        let (mut out, mut lse) = (Elements::of_tensor(&out).to_f32(), lse.to_vec::<f32>().unwrap());
        out.truncate(problem.q.len());
        lse.truncate(problem.q.len() / 128);
        problem.check(&device, &Outcome { out, lse }).unwrap();
    }
}

#[test]
fn tensors_of_two_streams_do_not_mix() {
    let Some(device) = cuda() else { return };
    let other = Device::cuda(0).unwrap();
    let problem = problem();
    let tables = Tables::new(&problem, &other);
    let batch = Batch::new(&problem.qo_indptr, tables.kv_table());
    let mut plan = AttentionPlan::new(&device, &problem.case.spec, &batch, problem.case.splits).unwrap();
    let q = Elements::new(DType::F16, &problem.q).tensor(&device, &[41, 8, 128]);
    let mut out = Tensor::zeros(&device, DType::F16, &[41, 8, 128]).unwrap();
    let refused = plan.run(q.view(), tables.kv(), out.view_mut(), None);
    assert!(matches!(refused, Err(Error::Device { .. })));
    // On their own stream they work, beside work on the first.
    assert!(problem.check(&other, &problem.run(&other)).is_ok());
}

#[test]
fn memory_of_other_libraries_is_taken_as_it_is() {
    let Some(device) = cuda() else { return };
    let stream = device.cuda_stream().unwrap().clone();
    let theirs = Device::cuda_on_stream(&stream).unwrap();
    let slice = stream.clone_htod(&[1.0f32, 2.0, 3.0, 4.0]).unwrap();
    let view = View::from_cuda_slice(&theirs, &slice, &[2, 2]).unwrap();
    let mut out = Tensor::zeros(&theirs, DType::F32, &[1, 2]).unwrap();
    ferroflash::op::layer::embedding(&theirs, view, &[1], out.view_mut()).unwrap();
    assert_eq!(out.to_vec::<f32>().unwrap(), [3.0, 4.0]);
    let elsewhere = Device::cuda(0).unwrap();
    assert!(matches!(View::from_cuda_slice(&elsewhere, &slice, &[4]), Err(Error::Device { .. })));
}
