package topology

import (
	"encoding/json"
	"path"
	"regexp"
	"strings"
)

// Values are those of a flag, which is given once for each of them.
type Values []string

// MarshalJSON writes a single value as text.
func (v Values) MarshalJSON() ([]byte, error) {
	if len(v) == 1 {
		return json.Marshal(v[0])
	}
	return json.Marshal([]string(v))
}

// UnmarshalJSON reads text or a list of texts.
func (v *Values) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*v = Values{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(v))
}

// Component is a program of Kubernetes whose flags a lab file can set.
type Component string

// The components.
const (
	APIServer         Component = "kube-apiserver"
	ControllerManager Component = "kube-controller-manager"
	Scheduler         Component = "kube-scheduler"
	Kubelet           Component = "kubelet"
)

// mine says of a flag that a user may set it although the lab does: the user's stands in its place.
const mine = ""

// Why a user may not set a flag.
const (
	wantGates  = "want featureGates instead"
	byKubeadm  = "it is where kubeadm has put the keys and certificates of the cluster"
	isAddress  = "the addresses of nodes are those of the underlay"
	isProgram  = "the parts of the cluster would no longer find each other"
	inRegister = "the node is registered by the lab, under its name and with its labels and taints"
)

// flags are those that the lab itself, or kubeadm for it, has the components begin with, or that change what these decide,
// by name, with the reason why a user may not set it. Whoever sets two that contradict each other gets a lab that comes up
// half and says so after minutes. A test of the lab package holds that what the components are started with is here.
var flags = map[Component]map[string]string{
	APIServer: {
		"feature-gates":            wantGates,
		"service-cluster-ip-range": "want serviceCIDR instead",
		"advertise-address":        isAddress, "bind-address": isAddress,
		"secure-port":         "all parts of the cluster look for the API server at port 6443",
		"permit-port-sharing": "connections of kubelets wait at the port before the API server listens there",
		"etcd-servers":        "the cluster's etcd runs beside the API server",
		"etcd-cafile":         byKubeadm,
		"etcd-certfile":       byKubeadm, "etcd-keyfile": byKubeadm,
		"client-ca-file": byKubeadm, "tls-cert-file": byKubeadm, "tls-private-key-file": byKubeadm,
		"kubelet-client-certificate": byKubeadm, "kubelet-client-key": byKubeadm, "kubelet-certificate-authority": byKubeadm,
		"proxy-client-cert-file": byKubeadm, "proxy-client-key-file": byKubeadm,
		"requestheader-client-ca-file":       byKubeadm,
		"requestheader-allowed-names":        isProgram,
		"requestheader-username-headers":     isProgram,
		"requestheader-group-headers":        isProgram,
		"requestheader-extra-headers-prefix": isProgram,
		"requestheader-uid-headers":          isProgram,
		"service-account-signing-key-file":   byKubeadm,
		"kubelet-preferred-address-types":    "no DNS knows the names of nodes",
		"authorization-mode":                 mine, "enable-admission-plugins": mine, "allow-privileged": mine,
		"enable-bootstrap-token-auth": mine, "service-account-issuer": mine, "service-account-key-file": mine,
	},
	ControllerManager: {
		"feature-gates":            wantGates,
		"cluster-cidr":             "want podCIDR instead",
		"service-cluster-ip-range": "want serviceCIDR instead",
		"node-cidr-mask-size":      "want nodeCIDRMask instead",
		"node-cidr-mask-size-ipv4": "want nodeCIDRMask instead",
		"node-cidr-mask-size-ipv6": "want nodeCIDRMask instead",
		"allocate-node-cidrs":      "the routes of the lab are those of the nodes' pod ranges",
		"cluster-name":             "want the cluster's name instead",
		"secure-port":              "the probes of the pod ask at its own port",
		"kubeconfig":               byKubeadm, "authentication-kubeconfig": byKubeadm, "authorization-kubeconfig": byKubeadm,
		"client-ca-file": byKubeadm, "requestheader-client-ca-file": byKubeadm, "root-ca-file": byKubeadm,
		"cluster-signing-cert-file": byKubeadm, "cluster-signing-key-file": byKubeadm,
		"service-account-private-key-file": byKubeadm, "tls-cert-file": byKubeadm, "tls-private-key-file": byKubeadm,
		"bind-address": mine, "controllers": mine, "use-service-account-credentials": mine, "leader-elect": mine,
		"kube-api-qps": mine, "kube-api-burst": mine,
	},
	Scheduler: {
		"feature-gates": wantGates,
		"config":        "with it kube-scheduler takes no notice of the flags by which it finds the API server",
		"secure-port":   "the probes of the pod ask at its own port",
		"kubeconfig":    byKubeadm, "authentication-kubeconfig": byKubeadm, "authorization-kubeconfig": byKubeadm,
		"tls-cert-file": byKubeadm, "tls-private-key-file": byKubeadm,
		"bind-address": mine, "leader-elect": mine,
	},
	Kubelet: {
		"feature-gates":        wantGates,
		"cluster-domain":       "want dnsDomain instead",
		"node-labels":          "want nodes[].labels instead",
		"register-with-taints": "want nodes[].taints instead",
		"register-node":        inRegister, "hostname-override": inRegister,
		"node-ip":    isAddress,
		"address":    isAddress,
		"port":       "the API server looks for kubelets at port 10250",
		"config":     "it is where the lab has its own settings of kubelet; want each as a flag, or a drop-in directory with config-dir",
		"kubeconfig": byKubeadm, "bootstrap-kubeconfig": byKubeadm, "cert-dir": byKubeadm,
		"client-ca-file": byKubeadm, "tls-cert-file": byKubeadm, "tls-private-key-file": byKubeadm,
		"container-runtime-endpoint": "it is the node's own containerd",
		"image-service-endpoint":     "it is the node's own containerd",
		"pod-manifest-path":          "it is where kubeadm has put the control plane",
		"root-dir":                   "it is a part of the node's disk",
		"cgroup-driver":              "containerd's is the same",
		"cgroups-per-qos":            "a node's cgroups are a part of the lab's", "enforce-node-allocatable": "a node's cgroups are a part of the lab's",
		"anonymous-auth": mine, "authentication-token-webhook": mine, "authorization-mode": mine, "cluster-dns": mine,
		"resolv-conf": mine, "fail-cgroupv1": mine, "fail-swap-on": mine, "serialize-image-pulls": mine,
		"local-storage-capacity-isolation": mine, "eviction-hard": mine, "image-gc-high-threshold": mine, "oom-score-adj": mine,
		"config-map-and-secret-change-detection-strategy": mine, "max-pods": mine,
	},
}

// Flag tells of a flag of a component whether the lab has a say in it, and if so why a user has none; an empty reason says
// that the user's value stands in the place of the lab's.
func Flag(c Component, name string) (reason string, known bool) {
	reason, known = flags[c][name]
	return reason, known
}

var flagName = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)

// args checks extra command-line arguments. Whether a component knows a flag, only the component can say.
func (b *builder) args(args map[string][]text, of Component) map[string]Values {
	var m map[string]Values
	for _, name := range sortedKeys(args) {
		given := args[name]
		at := source{}
		if len(given) > 0 {
			at = given[0].at
		}
		reason, _ := Flag(of, name)
		switch {
		case strings.HasPrefix(name, "-"):
			b.add(at, "", "want the flag without dashes: %s", strings.TrimLeft(name, "-"))
			continue
		case !flagName.MatchString(name):
			b.add(at, "", "%q is not the name of a flag; want something like audit-log-maxage", name)
			continue
		case reason != "":
			b.add(at, given[0].value, "the lab decides this flag; %s", reason)
			continue
		}
		var values Values
		for _, v := range given {
			if strings.ContainsAny(v.value, "\x00\n\r") {
				b.add(v.at, v.value, "want a value of one line")
				continue
			}
			values = append(values, v.value)
		}
		if m == nil {
			m = map[string]Values{}
		}
		m[name] = values
	}
	return m
}

// Paths of kube-apiserver's container that a volume may not cover, nor lie in, and such that it may not cover.
var (
	containerWhole = []string{"/proc", "/sys", "/dev", "/etc/kubernetes/pki", "/etc/ca-certificates", "/etc/ssl/certs", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates"}
	containerTop   = []string{"/usr/local/bin", "/usr/bin", "/bin", "/sbin", "/lib", "/lib64", "/etc/passwd", "/etc/group", "/etc/hosts", "/etc/resolv.conf"}
)

// volumes checks what kube-apiserver sees of the host. Relative paths begin at the lab file's directory.
func (b *builder) volumes(specs []volumeSpec, dir string) []Volume {
	var volumes []Volume
	for _, s := range specs {
		v := Volume{HostPath: s.hostPath.value, MountPath: s.mountPath.value, ReadOnly: s.readOnly.value}
		if !path.IsAbs(v.HostPath) && path.IsAbs(dir) {
			v.HostPath = path.Join(dir, v.HostPath)
		}
		v.HostPath = path.Clean(v.HostPath)
		if s.hostPath.value == "" || !isPlainPath(v.HostPath) {
			b.add(s.hostPath.at, s.hostPath.value, "want a path of the host, absolute or from the lab file's directory")
		} else {
			b.hostPath(v.HostPath, s.hostPath)
		}
		if owned := covered(v.MountPath, containerWhole, containerTop); !isPlainPath(v.MountPath) {
			b.add(s.mountPath.at, v.MountPath, "want an absolute path without . and ..")
		} else if owned != "" {
			b.add(s.mountPath.at, v.MountPath, "would cover kube-apiserver's own %s; want a mountPath elsewhere, such as /etc/kubernetes/extra", owned)
		}
		volumes = append(volumes, v)
	}
	return volumes
}

// fileFlag are names of flags whose value is a file that kube-apiserver reads at its start, and ends if it cannot.
var fileFlag = regexp.MustCompile(`-(file|config|certificate|cert-key|cafile|kubeconfig)$|^(authentication|authorization|encryption-provider)-config$`)

// apiServerFiles checks that kube-apiserver sees the files that its flags name: it runs in a container, to which most paths
// of the host are unknown.
func (b *builder) apiServerFiles(args map[string][]text, volumes []Volume) {
	for _, name := range sortedKeys(args) {
		if !fileFlag.MatchString(name) {
			continue
		}
		for _, v := range args[name] {
			for file := range strings.SplitSeq(v.value, ",") {
				if !isPlainPath(file) || strings.HasPrefix(file, "/etc/kubernetes/pki/") || strings.HasPrefix(file, "/etc/ssl/certs/") {
					continue
				}
				seen := false
				for _, volume := range volumes {
					seen = seen || file == volume.MountPath || strings.HasPrefix(file, volume.MountPath+"/")
				}
				if !seen {
					b.add(v.at, v.value, "kube-apiserver's container has no %s; want an entry of apiServerVolumes whose mountPath is that, or a directory above it", file)
				}
			}
		}
	}
}
