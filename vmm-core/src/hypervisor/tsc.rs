//! The offset of a vCPU's time stamp counter to the host's (KVM_VCPU_TSC_CTRL, since Linux 5.16).
//!
//! A counter that is written is a guess for KVM: a value that is within a second of what it expects is taken for an attempt
//! to make vCPUs agree, and is not the value that the vCPU gets. A guest that is saved in its first second, as small ones
//! are, would go on with another time. An offset is taken as it is.

#![allow(unsafe_code, reason = "an ioctl that kvm-ioctls has for other architectures only")]

use std::io;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::HvError;

mod ioctls {
    #![allow(missing_docs, reason = "the macro makes public functions")]
    vmm_sys_util::ioctl_iow_nr!(
        KVM_SET_DEVICE_ATTR,
        kvm_bindings::KVMIO,
        0xe1,
        kvm_bindings::kvm_device_attr
    );
    vmm_sys_util::ioctl_iow_nr!(
        KVM_GET_DEVICE_ATTR,
        kvm_bindings::KVMIO,
        0xe2,
        kvm_bindings::kvm_device_attr
    );
}

fn attribute(offset: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(offset) as u64,
        flags: 0,
    }
}

/// The offset; `None` if this KVM does not tell.
pub fn offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    let attribute = attribute(&mut offset);
    // SAFETY: KVM writes 8 bytes to the address in the attribute, which is that of a local variable.
    let result = unsafe { ioctl_with_ref(vcpu, ioctls::KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

/// Sets the offset.
pub fn set_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), HvError> {
    let attribute = attribute(&mut offset);
    // SAFETY: KVM reads 8 bytes at the address in the attribute, which is that of a local variable.
    match unsafe { ioctl_with_ref(vcpu, ioctls::KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(HvError::Call { call: "KVM_SET_DEVICE_ATTR", source: io::Error::last_os_error() }),
    }
}
