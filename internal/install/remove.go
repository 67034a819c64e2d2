package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/deploy"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

const daemonSet = "fathom-agent"

// InUseError says that pods use the network that was to be removed.
type InUseError struct{ Pods []string }

func (e *InUseError) Error() string {
	const most = 5
	names := e.Pods
	more := ""
	if len(names) > most {
		names, more = names[:most], fmt.Sprintf(" and %d more", len(names)-most)
	}
	return fmt.Sprintf("%d pods use the network: %s%s", len(e.Pods), strings.Join(names, ", "), more)
}

// Remove removes the network from a cluster. Agents that clean up their nodes replace the running ones, and when every node
// is clean, everything that was installed is deleted. With force, pods' devices are removed too.
func Remove(ctx context.Context, client *kube.Client, force bool, progress func(clean, want int32)) error {
	_, err := client.AppsV1().DaemonSets(netconf.Namespace).Get(ctx, daemonSet, metav1.GetOptions{})
	installed := err == nil
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("look for DaemonSet %s/%s: %w", netconf.Namespace, daemonSet, err)
	}
	if installed {
		if !force {
			if err := unused(ctx, client); err != nil {
				return err
			}
		}
		// While there are agents that can withdraw the routes. An agent that merely ends withdraws nothing: routers should
		// keep the routes for the next one.
		if err := kube.DeleteAll(ctx, client, kube.BGPPeers); err != nil {
			return err
		}
		const patch = `{"spec": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": "100%"}},
			"template": {"spec": {"containers": [{"name": "agent", "args": ["clean"]}]}}}}`
		if _, err := client.AppsV1().DaemonSets(netconf.Namespace).Patch(ctx, daemonSet, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("make the agents clean their nodes: %w", err)
		}
		if err := Wait(ctx, client, progress); err != nil {
			return err
		}
	}
	if err := takeBackAddresses(ctx, client); err != nil {
		return err
	}
	if err := deletePools(ctx, client); err != nil {
		return err
	}
	objects, err := kube.Decode(bytes.NewReader(deploy.Manifests()))
	if err != nil {
		return err
	}
	cache, err := dnsObjects()
	if err != nil {
		return err
	}
	// Policies are the user's, and go on with another network, as NetworkPolicies do.
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool {
		return o.GetKind() == "CustomResourceDefinition" && !strings.HasSuffix(o.GetName(), "."+v1alpha1.GroupVersion.Group)
	})
	if err := client.Delete(ctx, append(objects, cache...)); err != nil {
		return err
	}
	return waitGone(ctx, client)
}

// takeBackAddresses removes the addresses of Services that no node would answer for. The pools are deleted first, otherwise
// a controller that is about to end would assign the addresses again.
func takeBackAddresses(ctx context.Context, client *kube.Client) error {
	if err := kube.DeleteAll(ctx, client, kube.AddressPools); err != nil {
		return err
	}
	for {
		services, err := client.CoreV1().Services("").List(ctx, metav1.ListOptions{})
		if err != nil {
			return fmt.Errorf("look for addresses of Services: %w", err)
		}
		left := 0
		for i := range services.Items {
			s := &services.Items[i]
			if !vip.Wrote(s) {
				continue
			}
			left++
			if err := client.SetIngress(ctx, s, vip.Owner, nil, vip.Finalizers(s, false)); err != nil && !apierrors.IsConflict(err) {
				return err
			}
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove the addresses of %d Services: %w", left, context.Cause(ctx))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// deletePools deletes the pools of pods' addresses with their blocks, including their finalizers: no pod has an address of
// them any more, and the controller, which removes finalizers, may be gone. The CRD could not be deleted otherwise.
func deletePools(ctx context.Context, client *kube.Client) error {
	for {
		if err := errors.Join(kube.DeleteAll(ctx, client, kube.IPPools), kube.DeleteAll(ctx, client, kube.IPBlocks)); err != nil {
			return err
		}
		pools, err := kube.List(ctx, client, kube.IPPools, kube.Selection{})
		if err != nil {
			return err
		}
		ours := 0
		for _, p := range pools {
			if !slices.Contains(p.Finalizers, ippool.Finalizer) {
				continue // gone by now, or held by a finalizer that is not ours
			}
			ours++
			if err := client.SetPoolFinalizers(ctx, p, ippool.WithoutFinalizer(p.Finalizers)); err != nil && !apierrors.IsConflict(err) {
				return err
			}
		}
		if ours == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("delete %d IPPools: %w", ours, context.Cause(ctx))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// waitGone returns when the deletion of the namespace is complete: until then nothing can be created in it.
func waitGone(ctx context.Context, client *kube.Client) error {
	for {
		ns, err := client.CoreV1().Namespaces().Get(ctx, netconf.Namespace, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err), err == nil && ns.DeletionTimestamp == nil:
			return nil
		case err != nil:
			return fmt.Errorf("wait for the end of namespace %s: %w", netconf.Namespace, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of namespace %s: %w", netconf.Namespace, context.Cause(ctx))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// unused returns an InUseError if pods use the network.
func unused(ctx context.Context, client *kube.Client) error {
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "status.phase!=Succeeded,status.phase!=Failed"})
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	var names []string
	for _, p := range pods.Items {
		if !p.Spec.HostNetwork && p.Status.PodIP != "" {
			names = append(names, p.Namespace+"/"+p.Name)
		}
	}
	if len(names) > 0 {
		return &InUseError{names}
	}
	return nil
}
