package template

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/uuid"

	"github.com/fathom-network/fathom/internal/lab/stored"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// passing are the kinds, by what their keys have behind the registry, that a cluster's programs make anew as they start or that tell
// of what has been: no cluster begins with them. Secrets are among them: what a cluster needs to begin with is made for it.
var passing = []string{"events/", "leases/", "masterleases/", "peerserverleases/", "csinodes/", "certificatesigningrequests/", "secrets/"}

// Generalize returns the objects of a cluster as those of one like it that has just been made, with marks in the place of
// the public texts of its identity, and of each of its Nodes what is told of its making. It is an error if there is an object of which it
// cannot be told what it has of the cluster's own.
func Generalize(state stored.State, id stored.Identity) (stored.State, map[string]metav1.ObjectMeta, error) {
	var out stored.State
	nodes := map[string]metav1.ObjectMeta{}
	r := stored.Rewriter{Text: id.Mark(), Time: func(t time.Time) time.Time { return t }}
	for _, kv := range state.KVs {
		path, ok := strings.CutPrefix(string(kv.Key), stored.Registry)
		if !ok {
			return stored.State{}, nil, fmt.Errorf("the key %q is none of the API server's", kv.Key)
		}
		if slices.ContainsFunc(passing, func(prefix string) bool { return strings.HasPrefix(path, prefix) }) {
			continue
		}
		if !kube.IsStoredProtobuf(kv.Value) {
			value, err := r.JSON(kv.Value)
			if !isAPI(path) {
				err = errors.New("it is of a kind that a template cannot speak for")
			}
			if err != nil {
				return stored.State{}, nil, fmt.Errorf("%s: %w", kv.Key, err)
			}
			out.KVs = append(out.KVs, stored.KV{Key: kv.Key, Value: value})
			continue
		}
		object, err := kube.DecodeStored(kv.Value)
		if err != nil {
			return stored.State{}, nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
		if node, ok := object.(*corev1.Node); ok {
			nodes[node.Name] = begun(node.ObjectMeta)
			continue
		}
		if isLate(object) || !beginAnew(object) {
			continue
		}
		r.Value(reflect.ValueOf(object).Elem())
		if kv.Value, err = kube.EncodeStored(object); err != nil {
			return stored.State{}, nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
		out.KVs = append(out.KVs, kv)
	}
	return out, nodes, errors.Join(checkPublic(out)...)
}

// isAPI says whether what is stored there is a kind or a group of an API. What other objects say that are stored as JSON, only who
// defined their kinds knows.
func isAPI(path string) bool {
	return strings.HasPrefix(path, "apiextensions.k8s.io/customresourcedefinitions/") || strings.HasPrefix(path, "apiregistration.k8s.io/apiservices/")
}

// checkPublic looks for keys, certificates and tokens.
func checkPublic(state stored.State) (problems []error) {
	for _, kv := range state.KVs {
		if stored.IsSecret(kv.Value) {
			problems = append(problems, fmt.Errorf("%s has a key, a certificate or a token in it", kv.Key))
		}
	}
	return problems
}

// begun is what an object's metadata say of its making: the first to write it, and not what status others have given it since.
func begun(m metav1.ObjectMeta) metav1.ObjectMeta {
	m.ManagedFields = slices.DeleteFunc(m.ManagedFields, func(f metav1.ManagedFieldsEntry) bool { return f.Subresource != "" })
	if len(m.ManagedFields) > 1 {
		m.ManagedFields = m.ManagedFields[:1]
	}
	return metav1.ObjectMeta{Name: m.Name, UID: m.UID, CreationTimestamp: m.CreationTimestamp, ManagedFields: m.ManagedFields}
}

// isLate says whether the object is CoreDNS's Deployment, or what became of it. Pods of it that are there before their node has a network
// are tried, refused, and tried again a second later: the Deployment is made when nodes are Ready.
func isLate(object runtime.Object) bool {
	switch o := object.(type) {
	case *appsv1.Deployment:
		return isCoreDNS(o.ObjectMeta)
	case *appsv1.ReplicaSet:
		return isCoreDNS(o.ObjectMeta)
	case *corev1.Pod:
		return isCoreDNS(o.ObjectMeta)
	}
	return false
}

func isCoreDNS(m metav1.ObjectMeta) bool {
	return m.Namespace == metav1.NamespaceSystem && m.Labels["k8s-app"] == "kube-dns"
}

const (
	answers     = "fathom.network/answers"
	lastTrigger = "endpoints.kubernetes.io/last-change-trigger-time"
)

// beginAnew makes of an object what it was before the cluster's programs told what has become of it: a pod that its node
// has not heard of, a Deployment without a pod that is ready. It returns false if the object was made by such a program, which will make it again.
func beginAnew(object runtime.Object) bool {
	m, err := meta.Accessor(object)
	if err != nil {
		return true // the range of Services' addresses, in its old form
	}
	if m.GetDeletionTimestamp() != nil {
		return false
	}
	statuses := true // whether the status is what others tell
	switch o := object.(type) {
	case *corev1.Pod:
		if _, mirror := o.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
			return false
		}
		if o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed {
			return false
		}
		var conditions []corev1.PodCondition
		for _, c := range o.Status.Conditions {
			if c.Type == corev1.PodScheduled {
				conditions = append(conditions, c)
			}
		}
		o.Status = corev1.PodStatus{Phase: corev1.PodPending, QOSClass: o.Status.QOSClass, Conditions: conditions}
		delete(o.Annotations, answers)
		o.ManagedFields = slices.DeleteFunc(o.ManagedFields, func(f metav1.ManagedFieldsEntry) bool {
			return f.FieldsV1 != nil && strings.Contains(f.FieldsV1.GetRawString(), answers)
		})
	case *appsv1.DaemonSet:
		o.Status = appsv1.DaemonSetStatus{}
	case *appsv1.Deployment:
		o.Status = appsv1.DeploymentStatus{}
	case *appsv1.ReplicaSet:
		o.Status = appsv1.ReplicaSetStatus{}
	case *corev1.Endpoints: //nolint:staticcheck // it is what an API server of today stores
		if o.Namespace == metav1.NamespaceDefault && o.Name == "kubernetes" {
			return false
		}
		o.Subsets = nil
		delete(o.Annotations, lastTrigger)
	case *discoveryv1.EndpointSlice:
		if o.Namespace == metav1.NamespaceDefault && o.Name == "kubernetes" {
			return false
		}
		o.Endpoints = nil
		delete(o.Annotations, lastTrigger)
	case *corev1.ConfigMap:
		// The signature of what a bootstrap token gives.
		for key := range o.Data {
			if strings.HasPrefix(key, "jws-kubeconfig-") {
				delete(o.Data, key)
			}
		}
	default:
		statuses = false
	}
	if statuses {
		m.SetManagedFields(slices.DeleteFunc(m.GetManagedFields(), func(f metav1.ManagedFieldsEntry) bool { return f.Subresource != "" }))
	}
	return true
}

// Personalize returns the objects of a new cluster: generalised ones with the cluster's own addresses, public texts, UIDs and times, and
// its Nodes. The objects are as old, compared with each other, as they were, and the youngest is of now.
func Personalize(state stored.State, from, to stored.Identity, made map[string]metav1.ObjectMeta, nodes []*corev1.Node, now time.Time) (stored.State, error) {
	uids := map[string]string{}
	var youngest time.Time
	learn := func(m metav1.Object) {
		uids[string(m.GetUID())] = string(uuid.NewUUID())
		if t := m.GetCreationTimestamp().Time; t.After(youngest) {
			youngest = t
		}
	}
	objects := make([]runtime.Object, len(state.KVs))
	for i, kv := range state.KVs {
		if !kube.IsStoredProtobuf(kv.Value) {
			var m struct {
				Metadata metav1.ObjectMeta `json:"metadata"`
			}
			if err := json.Unmarshal(kv.Value, &m); err != nil {
				return stored.State{}, fmt.Errorf("%s: %w", kv.Key, err)
			}
			learn(&m.Metadata)
			continue
		}
		object, err := kube.DecodeStored(kv.Value)
		if err != nil {
			return stored.State{}, fmt.Errorf("%s: %w", kv.Key, err)
		}
		if m, err := meta.Accessor(object); err == nil {
			learn(m)
		}
		objects[i] = object
	}
	for _, m := range made {
		learn(&m)
	}
	delete(uids, "")
	unmark := to.Unmark()
	r := stored.Rewriter{
		Text: func(s string) string {
			return stored.MoveAddresses(replaceUIDs(unmark(s), uids), from.Underlays(), to.Underlays())
		},
		Time: func(t time.Time) time.Time { return t.Add(now.Sub(youngest)) },
	}
	var out stored.State
	for i, kv := range state.KVs {
		var err error
		if objects[i] == nil {
			kv.Value, err = r.JSON(kv.Value)
		} else {
			r.Value(reflect.ValueOf(objects[i]).Elem())
			kv.Value, err = kube.EncodeStored(objects[i])
		}
		if err != nil {
			return stored.State{}, fmt.Errorf("%s: %w", kv.Key, err)
		}
		out.KVs = append(out.KVs, kv)
	}
	for _, node := range nodes {
		m, ok := made[node.Name]
		if !ok {
			return stored.State{}, fmt.Errorf("the template has no node %s", node.Name)
		}
		r.Value(reflect.ValueOf(&m).Elem())
		object := node.DeepCopy()
		object.UID, object.CreationTimestamp, object.ManagedFields = m.UID, m.CreationTimestamp, m.ManagedFields
		if err := out.Add("minions/"+node.Name, object); err != nil {
			return stored.State{}, err
		}
	}
	return out, nil
}

var uidLike = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)

// replaceUIDs returns the text with each of the UIDs replaced by its new one.
func replaceUIDs(s string, uids map[string]string) string {
	if len(s) < 36 {
		return s
	}
	return uidLike.ReplaceAllStringFunc(s, func(uid string) string {
		if next, ok := uids[uid]; ok {
			return next
		}
		return uid
	})
}
