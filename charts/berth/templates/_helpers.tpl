{{/* Berth's own objects are in one namespace, whose name the programs know. */}}
{{- define "berth.namespace" -}}
{{- if ne .Release.Namespace "berth-system" -}}
{{- fail (printf "Berth lives in the namespace berth-system, not in %s: helm ... --namespace berth-system --create-namespace" .Release.Namespace) -}}
{{- end -}}
berth-system
{{- end -}}

{{/* What every object of this release bears. */}}
{{- define "berth.labels" -}}
app.kubernetes.io/name: berth
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* What tells the pods of one part from all others; it never changes. Takes the part's name. */}}
{{- define "berth.selector" -}}
app.kubernetes.io/name: berth
app.kubernetes.io/component: {{ . }}
{{- end -}}

{{/* The reference of an image. Takes the root and the image's name in `images`. */}}
{{- define "berth.image" -}}
{{- $root := index . 0 -}}
{{- $image := get $root.Values.images (index . 1) -}}
{{- $registry := $root.Values.images.registry | default $image.registry -}}
{{- if $registry }}{{ $registry }}/{{ end -}}
{{ $image.repository }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- if $image.digest }}@{{ $image.digest }}{{ end -}}
{{- end -}}

{{/* An address to listen on. Takes the root and the port. */}}
{{- define "berth.listen" -}}
{{- $address := (index . 0).Values.listenAddress -}}
{{- if contains ":" $address }}[{{ $address }}]{{ else }}{{ $address }}{{ end }}:{{ index . 1 }}
{{- end -}}

{{/* A file of ours as it is, comments and all, with the labels of this release on each of its objects. */}}
{{- define "berth.labelled" -}}
{{- $root := index . 0 -}}
{{- $labels := printf "\nmetadata:\n  labels:\n%s\n" (include "berth.labels" $root | indent 4) -}}
{{- $root.Files.Get (index . 1) | replace "\nmetadata:\n" $labels -}}
{{- end -}}

{{/* Where a pod may run. Takes the values of its part. */}}
{{- define "berth.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* Where images come from. */}}
{{- define "berth.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* A sidecar speaks to a socket that belongs to root, and needs nothing else. */}}
{{- define "berth.sidecarSecurity" -}}
securityContext:
  runAsUser: 0
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* What is added to the environment of the programs on nodes. */}}
{{- define "berth.env" -}}
{{- range $name, $value := .Values.node.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* Directories of the host that filesystem pools or image files lie in, under the same path. */}}
{{- define "berth.extraMounts" -}}
{{- range $index, $path := .Values.node.extraHostPaths }}
- {name: extra-{{ $index }}, mountPath: {{ $path | quote }}, mountPropagation: HostToContainer}
{{- end }}
{{- end -}}
{{- define "berth.extraVolumes" -}}
{{- range $index, $path := .Values.node.extraHostPaths }}
- name: extra-{{ $index }}
  hostPath: {path: {{ $path | quote }}, type: Directory}
{{- end }}
{{- end -}}
